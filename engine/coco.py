"""The paper's rows of COCO-10k, of Tables 1, 2, 3, 6 and 7, as it prints them. No torch here."""

COLUMNS = ("ImgRwd", "CLIP", "Pick", "HPSv2", "MPS")
PAPER = {  # name: (NFE, *COLUMNS, cost = batch x iterations or GPU hours)
    "SDXL": (100, 0.7143, 0.3295, 0.2265, 0.2865, 11.87, ""),
    "DMD2-SDXL": (4, 0.8748, 0.3302, 0.2309, 0.2937, 12.41, "128 x 24k"),
    "Flash-DMD, TTUR1-1k": (4, 0.9509, 0.3292, 0.2322, 0.2968, 12.67, "64 x 1k"),
    "Flash-DMD, TTUR2-4k": (4, 0.9450, 0.3291, 0.2322, 0.2969, 12.65, "64 x 4k"),
    "Flash-DMD, TTUR2-8k": (4, 0.9740, 0.3298, 0.2327, 0.2981, 12.71, "64 x 8k"),
    "Flash-DMD, TTUR5-18k": (4, 0.9426, 0.3302, 0.2319, 0.2982, 12.63, "64 x 18k"),
    "Flash-DMD, stage 2": (4, 1.0035, 0.3285, 0.2346, 0.2930, 12.84, "12 H20 hours"),
    "Flash-DMD, 8 steps, TTUR2-3k": (8, 0.9159, 0.3281, 0.2319, 0.2981, 12.60, "48 x 3k"),
    "Flash-DMD, 8 steps, stage 2, 3k": (8, 1.0012, 0.3299, 0.2338, 0.2986, 12.75, "12 H20 hours"),
    "SD3-Medium": (28, 1.0173, 0.3301, 0.2273, 0.2933, 12.05, ""),
    "Flash-DMD on SD3, TTUR2-4k": (4, 1.0193, 0.3269, 0.2285, 0.2976, 12.43, "32 x 4k"),
}
