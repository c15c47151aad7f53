"""Every setting of a run, in one flat dataclass. A field's comment is its --help. Nothing here loads torch."""

import math
import os
from dataclasses import dataclass

from engine.errors import UserError

METHODS = ("flash", "dmd2", "dmdr", "advdmd")
TIMESTEPS = 1000  # of every schedule, as diffusion.T


@dataclass
class Config:
    """The settings of Flash-DMD. A sibling's Settings (siblings/) inherit them and add its own."""

    # fmt: off
    preset: str = "toy"  # a row of PRESETS; flags given beside it override it
    method: str = "flash"  # flash; dmd2 = the baseline; dmdr, advdmd = siblings (--method NAME --help: their flags)
    stage: int | str = 1  # 1 = distillation; 2 = preference optimisation joins it; reward = train a reward model
    model: str = "toy/sdxl"  # the teacher, and what G starts as: a diffusers pipeline folder, or a hub name
    teacher: str = ""  # another pipeline folder for the real score alone; G and the score estimator start as --model
    data: str = "toy"  # toy, a folder of images with captions (docs/data.md), or shards ("s/{000..127}.tar")
    prompts: str = ""  # a text file of prompts for G, one per line; default: the captions of the data
    t5: str = ""  # SD3: on = T5 reads the prompts too, or off; by default on where the folder of --model has it
    text_length: int = 256  # SD3: tokens that T5 reads of a prompt, at most 512; part of the student
    cache_text: str = ""  # folder that keeps all prompts encoded; no text encoder is held in training
    cache_latents: str = ""  # folder that keeps the VAE's latents of --data, for methods that see latents alone
    size_condition: str = "square"  # SDXL's size conditions: square = an uncropped square; original = the picture's own
    resolution: int = 64  # side of the square training images, pixels
    out: str = ""  # run folder; default runs/DATE-TIME
    iterations: int = 400  # loops of Algorithm 1; the generator moves in every TTUR-th
    batch_size: int = 16  # samples per loop, over all ranks
    micro_batch: int = 0  # samples of a rank that pass the networks at once; gradients add up; 0 = all
    student_steps: int = 4  # K, the student's sampling steps, 1 to 1000
    dm_steps: str = "high"  # student steps of the DM loss: high = all but the last of several (timestep-aware), or all
    ttur: int = 1  # loops per generator update (Algorithm 1, line 12)
    ema: float = 0.9  # lambda of Eq. 11; 1 = no pull
    gan_weight: float = 0.03  # lambda of Algorithm 1, line 16 (advdmd: weight of the policy loss); 0 = no GAN
    gan_loss: str = "hinge"  # Pixel-GAN's loss: hinge or logistic
    adv_reading: str = "b"  # what Pixel-GAN sees: a = the finished rollout, noised again (Eq. 9); b = its last step
    gan_crop: int = 0  # pixels: Pixel-GAN sees a random square of this side, to save memory. 0 = whole pictures
    gan_reals: str = "raw"  # what Pixel-GAN sees as real: raw images, or their vae round trip
    sam: str = "toy/sam"  # Pixel-GAN's image encoder: a folder, or a segment_anything checkpoint sam_vit_*.pth
    clip: str = "toy/clip"  # the CLIP that evaluation uses
    guidance: float = 3.0  # w, the guidance scale of the real score in Eq. 3
    teacher_guidance: float = 5.0  # guidance scale of the multi-step teacher in previews and in evaluate.py
    renoise: tuple = (0.02, 0.98)  # LOW,HIGH: the part of the noise range that the DM loss draws its t from
    lr: float = 4e-5  # generator's AdamW learning rate
    fake_lr: float = 3e-4  # score estimator's learning rate
    d_lr: float = 1e-3  # learning rate of the discriminator's heads
    lr_schedule: str = "linear"  # rates of G and score estimator: constant, or linear = falling to 0 over --iterations
    warmup: int = 0  # loops over which all learning rates rise to their values, in equal parts; 0 = none
    optimizer: str = "adamw"  # adamw, or adamw8bit = torchao's, moments in 8 bits; needs a C++ compiler
    weight_decay: float = 0.01  # of all networks
    clip_grad: float = 1.0  # largest gradient norm of the generator and of the score estimator
    init: str = ""  # stage 2: the stage-1 run to start from; default the newest
    reward: str = ""  # stage 2, dmdr: the latent reward model; default lrm or sd3_lrm beside --model. dmdr: or "clip"
    rl_ratio: int = 5  # stage 2: preference updates per distillation update; --iterations counts both
    rl_steps: str = "high"  # stage 2: student steps that are judged, never the last: high = the two noisiest, or all
    candidates: int = 4  # stage 2: k, candidates per step; advdmd, dmdr's grpo: rollouts per prompt
    carry: str = "random"  # stage 2: the candidate that the next step starts from: random, or best
    pair_threshold: float | tuple = 0.45  # stage 2: pairs whose softmax is this far apart are kept; A,B,...: by step
    beta: float = 0.05  # stage 2: beta of Eq. 12; H is a sum over dimensions
    ratio_clip: float = 0.0  # stage 2: hold ratios of mean densities to the reference's within 1 +- this (LPO: 0.1)
    rl_lr: float = 1e-5  # stage 2: learning rate of the preference updates
    rl_only: bool = False  # stage 2: no distillation beside it (the paper's post-training)
    lora_rank: int = 0  # train G and the score estimator as two LoRAs of this rank on one frozen network; 0 = copies
    quantize_frozen: str = ""  # int8 = with --lora-rank, the frozen network and text encoders in 8 bits (torchao)
    pairs: str = ""  # stage reward: a folder of picture pairs; metadata.jsonl with Pick-a-Pic's columns (docs/data.md)
    reward_lr: float = 1e-5  # stage reward: learning rate
    compile: bool = False  # torch.compile the three denoisers; needs a C++ compiler
    checkpointing: bool = False  # recompute activations in backward passes: less memory, about a third more time
    seed: int = 0  # of the whole run
    save_every: int = 200  # loops between checkpoints
    keep: int = 2  # checkpoints kept: the newest, and those to go back to
    preview_every: int = 100  # loops between preview pictures; 0 = none
    watch: str = ""  # a text file of prompts, one per line, scored at previews by CLIP, diversity and the reward model
    log_every: int = 10  # loops between lines of metrics.jsonl
    workers: int = 0  # data-loading processes per rank
    dry_run: bool = False  # print what the run needs (memory, FLOPs, GPU-hours) and end; needs no weights and no GPU
    gpus: int = 8  # --dry-run: how many GPUs; must divide the batch
    gpu_memory: float = 80.0  # --dry-run: GB of each GPU
    gpu_tflops: float = 400.0  # --dry-run: sustained bf16 TFLOP/s of each GPU
    resume: bool = False  # go on from the newest checkpoint in --out
    overwrite: bool = False  # replace the run in --out
    # fmt: on

    def check(self):
        """Raises UserError for values out of range, and for settings that exclude each other."""
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                self.require(name, not isinstance(number, float) or math.isfinite(number), "must be a finite number")
        for name in NOT_NEGATIVE:
            self.require(name, getattr(self, name) >= 0, "must not be negative")
        for name in POSITIVE:
            self.require(name, getattr(self, name) > 0, "must be positive")
        for name in AT_LEAST_1:
            self.require(name, getattr(self, name) >= 1, "must be at least 1")
        self.require("candidates", self.candidates >= 2, "must be at least 2: a pair needs a best and a worst")
        self.require("ema", 0 <= self.ema <= 1, "must lie in [0, 1]")
        self.check_steps()
        self.require("ratio_clip", 0 <= self.ratio_clip < 1, "must lie in [0, 1)")
        self.require("gan_crop", self.gan_crop <= self.resolution, "must not be larger than --resolution")
        self.require("text_length", 1 <= self.text_length <= 512, "must lie in 1 to 512")
        has_pairs = self.stage != "reward" or self.pairs
        self.require("pairs", has_pairs, "is missing: --stage reward needs a folder of picture pairs")
        previews = self.preview_every and self.stage != "reward"
        self.require("watch", not self.watch or previews, "needs previews: --preview-every above 0, --stage 1 or 2")
        if self.size_condition == "original" and (self.prompts or self.data == "toy"):
            raise UserError(
                "--size-condition original needs pictures with their own captions: give --data, and no --prompts"
            )
        if self.cache_text and self.stage == "reward":
            raise UserError("--cache-text is for stages 1 and 2: leave it out of --stage reward")
        if self.cache_text and self.data == "toy" and not (self.prompts or self.dry_run):
            raise UserError(
                "--cache-text needs --data, a folder or shards, or --prompts: the toy world's captions have no end"
            )
        if self.teacher and self.stage == "reward":
            raise UserError("--teacher is for stages 1 and 2: leave it out of --stage reward")
        if self.quantize_frozen and not self.lora_rank:
            raise UserError("--quantize-frozen needs --lora-rank: without LoRAs no network under training is frozen")
        if self.cache_latents and self.data == "toy":
            raise UserError(
                "--cache-latents needs --data, a folder or shards: the toy world draws new scenes without end"
            )
        if self.cache_latents and self.method == "flash" and self.gan_weight and self.gan_reals == "raw":
            raise UserError(
                "--cache-latents: Pixel-GAN reads the pictures themselves: leave it out, or pass --gan-reals vae"
            )
        if self.stage == 1 and self.ttur > self.iterations and not self.dry_run:
            raise UserError(
                f"--ttur {self.ttur} is above --iterations {self.iterations}: the generator would never move; "
                "lower the one or raise the other"
            )
        if not self.dry_run:
            self.per_rank(int(os.environ.get("WORLD_SIZE", 1)))

    def check_steps(self):
        """Raises UserError for student steps out of range, and where stage 2 cannot judge them."""
        K = self.student_steps
        self.require("student_steps", 1 <= K <= TIMESTEPS, f"must lie in 1 to {TIMESTEPS}")
        thresholds = self.thresholds()
        self.require("pair_threshold", all(0 <= p < 1 for p in thresholds), "must lie in [0, 1)")
        if self.stage == 2 and K == 1:
            raise UserError("--stage 2 needs --student-steps of at least 2: the last step has no density to prefer by")
        if self.stage == 2 and len(thresholds) > K:
            raise UserError(
                f"--pair-threshold has {len(thresholds)} numbers for {K} student steps: give one, or one for each"
            )

    def require(self, name, holds, what):
        """Raises UserError for field `name` unless `holds`. what: the rest of its message."""
        if not holds:
            raise UserError(f"{flag(name)} {what}")

    def judged(self):
        """How many student steps stage 2 judges, the noisiest; the last one, to x_0, has no density."""
        most = self.student_steps - 1
        return min(2, most) if self.rl_steps == "high" else most

    def thresholds(self):
        """--pair-threshold of each student step, noisiest first; the last of them holds for the steps that follow."""
        return self.pair_threshold if isinstance(self.pair_threshold, tuple) else (self.pair_threshold,)

    def per_rank(self, ranks):
        """Samples of a batch per rank. Raises UserError where ranks or micro-batches do not divide them."""
        if self.batch_size % ranks:
            raise UserError(f"--batch-size {self.batch_size} is not divisible by {ranks} ranks")
        samples = self.batch_size // ranks
        if self.micro_batch and samples % self.micro_batch:
            raise UserError(f"--micro-batch {self.micro_batch} does not divide the {samples} samples of a rank")
        return samples


NOT_NEGATIVE = "seed warmup workers micro_batch gan_crop lora_rank preview_every gan_weight weight_decay".split()
POSITIVE = "lr fake_lr d_lr rl_lr reward_lr beta clip_grad gpu_memory gpu_tflops".split()
AT_LEAST_1 = "iterations batch_size ttur save_every keep log_every resolution rl_ratio gpus".split()

# ASSUMPTION: the paper prints neither learning rates nor loss weights. Those of the public code that it builds on
# stand in, with "DMD2" or "LPO" beside them. SDXL's fake_lr is 5 times lr, SD3's rates and LoRA rank are ours, the rest
# are the toy's.
_SDXL = {
    "model": "stabilityai/stable-diffusion-xl-base-1.0",
    "resolution": 1024,
    "sam": "sam_vit_b_01ec64.pth",
    "clip": "openai/clip-vit-base-patch32",
    "guidance": 8.0,  # DMD2
    "renoise": (0.02, 0.981),  # DMD2: t = 20 .. 980
    "lr": 5e-7,  # DMD2
    "fake_lr": 2.5e-6,
    "lr_schedule": "constant",  # DMD2
    "checkpointing": True,
}
_SD3 = _SDXL | {
    "model": "stabilityai/stable-diffusion-3-medium-diffusers",
    "guidance": 7.0,
    "teacher_guidance": 7.0,  # Table 2
    "renoise": Config.renoise,
    "lora_rank": 64,
    "lr": 1e-5,
    "fake_lr": 2e-5,
}
# ASSUMPTION: SD3.5 is in no table of the paper: SD3's settings, and the guidance of its SD3.5-Large pictures.
_SD35 = _SD3 | {"guidance": 4.5, "teacher_guidance": 4.5, "batch_size": 32, "iterations": 4000, "ttur": 2}
# ASSUMPTION: rates and rank are SD3's; the guidance is what the models' cards recommend (Z-Image's 4 is w = 5 here).
_QWEN = _SD35 | {"model": "Qwen/Qwen-Image", "guidance": 4.0, "teacher_guidance": 4.0, "cache_text": "runs/text"}
_Z_IMAGE = _QWEN | {"model": "Tongyi-MAI/Z-Image", "guidance": 5.0, "teacher_guidance": 5.0}
_STAGE2 = _SDXL | {
    "stage": 2,
    "rl_lr": 2e-7,
    "beta": 0.0076,  # LPO: 500 on a mean over SDXL's 65,536 dimensions
    "pair_threshold": (0.6, 0.573),  # LPO: at 999, at 749. ASSUMPTION: of 8 steps the second, 874, has 749's
    "ratio_clip": 0.1,  # LPO
}
_SD3_STAGE2 = {"stage": 2, "batch_size": 32, "iterations": 4000, "rl_lr": 4e-6, "beta": 0.0019, "ratio_clip": 0.1}
_DMD2 = _SDXL | {  # its code for SDXL in 4 steps; the GAN's weights, 5e-3 and 0.01, are in siblings/dmd2.py
    "method": "dmd2",
    "fake_lr": 5e-7,
    "clip_grad": 10.0,
    "warmup": 500,
    "head": "published",
}
PRESETS = {  # a method's values of the common settings are in its Settings (siblings/)
    "toy": {},
    "dmd2": {"method": "dmd2", "iterations": 2000},  # the toy, as the next two
    "dmdr": {"method": "dmdr", "iterations": 2000},
    "advdmd": {"method": "advdmd", "iterations": 2000},
    "sdxl-dmd2": _DMD2 | {"batch_size": 128, "iterations": 24000},  # Table 1
    "sdxl-4step": _SDXL | {"batch_size": 64, "iterations": 1000},  # Table 1
    "sdxl-4step-ttur2": _SDXL | {"batch_size": 64, "iterations": 4000, "ttur": 2},  # Table 1; 8,000 too
    "sdxl-4step-ttur5": _SDXL | {"batch_size": 64, "iterations": 18000, "ttur": 5},  # Table 1
    "sdxl-8step": _SDXL | {"batch_size": 48, "iterations": 3000, "ttur": 2, "student_steps": 8},  # Table 6; 6,000 too
    "sd3-4step": _SD3 | {"batch_size": 32, "iterations": 4000, "ttur": 2},  # Table 2; 7,000 too
    "sd35-medium-4step": _SD35 | {"model": "stabilityai/stable-diffusion-3.5-medium"},
    "sd35-large-4step": _SD35 | {"model": "stabilityai/stable-diffusion-3.5-large"},
    "qwen-4step": _QWEN,
    "qwen-2step": _QWEN | {"student_steps": 2},  # AdvDMD's number, by --method advdmd too
    "zimage-4step": _Z_IMAGE,
    "sdxl-stage2": _STAGE2 | {"batch_size": 64, "iterations": 5000},  # Tables 3, 4. ASSUMPTION: the batch is stage 1's
    # ASSUMPTION: in no table. Stage 1's batch and SDXL's ratio of rates; LPO's 500 on a mean over 262,144 dimensions
    "sd3-stage2": _SD3 | _SD3_STAGE2,
    "sd35-medium-stage2": _SD35 | _SD3_STAGE2 | {"model": "stabilityai/stable-diffusion-3.5-medium"},
    "sdxl-8step-stage2": _STAGE2 | {"batch_size": 48, "iterations": 3000, "student_steps": 8},  # Table 7; 6,000 too
}

CHOICES = {
    "preset": tuple(PRESETS),
    "method": METHODS,
    "stage": (1, 2, "reward"),
    "t5": ("on", "off"),
    "size_condition": ("square", "original"),
    "rl_steps": ("high", "all"),
    "carry": ("random", "best"),
    "dm_steps": ("high", "all"),
    "lr_schedule": ("constant", "linear"),
    "gan_loss": ("hinge", "logistic"),
    "adv_reading": ("a", "b"),
    "gan_reals": ("raw", "vae"),
    "head": ("scaled", "published", "map"),
    "d_block": ("middle", "last"),
    "optimizer": ("adamw", "adamw8bit"),
    "quantize_frozen": ("int8",),
    "rl": ("backprop", "grpo"),  # this and the next two: dmdr's
    "dm_input": ("rollout", "renoised"),
    "lora_layers": ("all", "qv"),
}


def flag(name):
    """A field's name as its flag: gan_weight -> --gan-weight."""
    return "--" + name.replace("_", "-")
