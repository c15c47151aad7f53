"""The paper's claims, and those of its siblings DMDR and AdvDMD, as rows of the laboratory to compare.

Claims that are `late` were written down when their rows were there: ratios; CLIP scores; prompts right of stage 2
against stage 1, and of all noise levels; Pixel-GAN with DM at the noisy steps; Table 1 in reward, but for TTUR 5. Of
renoising, and of DM at every step, the rows of seed 0 were there.
Left out: that the DM loss regularises RL better than others do (DMDR; needs a KL baseline), D on final states alone
(AdvDMD). AdvDMD's 2-step students and DMDR's one-step ones are in lab/steps.py.
"""

from dataclasses import dataclass
from functools import partial

from lab import cost, siblings, stage1, variation
from lab.cost import DMD2_TTUR2, TTUR1, TTUR2, TTUR5, TUNED
from lab.siblings import FROZEN, ONLINE, PAID, STATIC, UNPAID, UNREWARDED
from lab.stage1 import EIGHT, EVERY_STEP, FLASH, HIGH_NOISE, LOW_NOISE, PURE, UNPULLED, UNSEEN
from lab.stage2 import ALL_NOISE, ALONE, JOINTLY, JOINTLY8, STAGE1, TEACHER, UNREAL
from lab.verdicts import SMALLER


@dataclass
class Claim:
    """That `better` beats `worse` (titles of rows) in a measure.

    paper: its figures, where it prints them. points: of rows that are measured on their way, the one for each side;
    "best" is verdicts.at_best. late: rows of it were there when it was written. reason: where it does not hold here,
    the likely reason, and what was tried.
    """

    text: str
    source: str
    better: str
    worse: str
    measure: str
    paper: str = ""
    points: tuple = (-1, -1)
    late: bool = False
    reason: str = ""

    def sign(self):
        return -1 if self.measure in SMALLER else 1


Late = partial(Claim, late=True)

OVER_CONTRAST = """Guess: over-contrast comes with much guidance; the toy's score is guided at w = 3, DMD2's on SDXL
at 8. Tried: w = 5 with Pixel-GAN (contrast 0.096, real scenes 0.091), not without."""
CEILING = """Guess: prompts right has a ceiling, which 50 steps nearly reach (98.2 %), and the paper's scores have
none; in reward stage 1 does pass the teacher (14.82 for 14.55). Tried: rates, schedules, w = 5, two GAN weights and
four EMA factors, none above 95.0 %; 8 steps reach 97.5 %."""
SD3_CEILING = """As above (the teacher has 97.9 %). Tried with seed 0: other rates, TTUR 2, DM at every step, w = 1.5
and 2, none above 95.2 %."""
OPTIMISED = """Guess: the reward measured here is the one that is optimised, so it grows with the share of preference
updates; the paper's ImageReward is another model than the one it optimises. Tried: ratios 1, 2, 5 and 10, and rates
5e-6 and 2e-5 for the joint run (seed 0), which trade reward for Fréchet distance."""
SUREST = """Guess: this reward model is surest at little noise, and a third pair per rollout is half as much again to
learn from. Tried: nothing."""
NARROW = """Guess: the toy's CLIP knows the world's scenes alone, and the pictures of RL alone leave them (Fréchet
distance 5.88); in the paper the two are 0.0009 apart. Tried: nothing."""
TRACKED = """Guess: after equally many generator updates (400; the paper: 1,000 and 3,600) TTUR 5 has seen five times
the samples, and its score estimator follows better. Tried: TTUR 2, which has more reward than TTUR 1 too (15.07)."""
HALF_WAY = """As in Table 1 (the teacher has 98.2 %), after 200 updates of G, half of stage 1's. Tried: nothing."""
DMD2 = cost.BASELINE
COLD = (siblings.COLD, siblings.COLD)
SD3 = stage1.SD3_STUDENT
SD3_TEACHER = next(iter(stage1.SD3_BASELINES))
ACCURACY = "prompt_accuracy"
T1, T3, T4 = "Table 1", "Table 3", "Table 4"
CLAIMS = (
    Claim(
        "Pure DM, at every step, is over-contrasted beside Flash-DMD",
        "3.3",
        FLASH,
        PURE,
        "contrast",
        reason=OVER_CONTRAST,
    ),
    Claim("Flash-DMD's pictures are more real than those of pure DM", "3.3", FLASH, PURE, "frechet"),
    Late("With DM at every step, Pixel-GAN makes pictures more real", "3.3", EVERY_STEP, PURE, "frechet"),
    Late("With DM at the noisy steps, Pixel-GAN makes pictures more real", "3.3", FLASH, UNSEEN, "frechet"),
    Late("DM at the noisy steps alone beats DM at every step", "3.3", FLASH, EVERY_STEP, "frechet"),
    Late("Renoising over the whole range beats high noise alone", "3.1", FLASH, HIGH_NOISE, "frechet"),
    Late("Renoising over the whole range beats low noise alone", "3.1", FLASH, LOW_NOISE, "frechet"),
    Claim("The EMA pull makes the student better", "Fig. 6", FLASH, UNPULLED, "frechet"),
    Claim("The EMA pull gets more prompts right", "Fig. 6", FLASH, UNPULLED, ACCURACY, "HPSv2 nearly the same"),
    Late("The student is preferred to its teacher", T1, STAGE1, TEACHER, "reward", "ImageReward 0.9509, 0.7143"),
    Claim(
        "The student gets more prompts right than its teacher",
        T1,
        FLASH,
        TEACHER,
        ACCURACY,
        "HPSv2 0.2968, 0.2865",
        reason=CEILING,
    ),
    Claim(
        "With flow matching it does so too",
        "Table 2",
        SD3,
        SD3_TEACHER,
        ACCURACY,
        "HPSv2 0.2976, 0.2933",
        reason=SD3_CEILING,
    ),
    Claim(
        "At TTUR 1, Flash-DMD is better than DMD2 at TTUR 5", T1, TTUR1, DMD2, "frechet", "ImageReward 0.9509, 0.8748"
    ),
    Claim(
        "At TTUR 1, it gets more prompts right than DMD2 at TTUR 5", T1, TTUR1, DMD2, ACCURACY, "HPSv2 0.2968, 0.2937"
    ),
    Late("At TTUR 1, it is preferred to DMD2 at TTUR 5", T1, TTUR1, DMD2, "reward", "ImageReward 0.9509, 0.8748"),
    Late("But it does not have DMD2's CLIP score", T1, DMD2, TTUR1, "clip_score", "0.3302, 0.3292"),
    Claim(
        "At TTUR 2, Flash-DMD is better than DMD2 at TTUR 5", T1, TTUR2, DMD2, "frechet", "ImageReward 0.9740, 0.8748"
    ),
    Late("At TTUR 2, it is preferred to DMD2 at TTUR 5", T1, TTUR2, DMD2, "reward", "ImageReward 0.9740, 0.8748"),
    Claim("At TTUR 5, Flash-DMD is better than DMD2", T1, TTUR5, DMD2, "frechet", "ImageReward 0.9426, 0.8748"),
    Claim("At TTUR 5, it is preferred to DMD2", T1, TTUR5, DMD2, "reward", "ImageReward 0.9426, 0.8748"),
    Claim("At TTUR 1, Flash-DMD is better than DMD2 tuned", T1, TTUR1, TUNED, "frechet", "ImageReward 0.9509, 0.8748"),
    Claim("At TTUR 1, it gets more prompts right than DMD2 tuned", T1, TTUR1, TUNED, ACCURACY, "HPSv2 0.2968, 0.2937"),
    Claim("At TTUR 1, it is preferred to DMD2 tuned", T1, TTUR1, TUNED, "reward", "ImageReward 0.9509, 0.8748"),
    Claim("At TTUR 2, Flash-DMD is better than DMD2 tuned", T1, TTUR2, TUNED, "frechet", "ImageReward 0.9740, 0.8748"),
    Claim("At TTUR 2, it is preferred to DMD2 tuned", T1, TTUR2, TUNED, "reward", "ImageReward 0.9740, 0.8748"),
    Claim("At TTUR 5, Flash-DMD is better than DMD2 tuned", T1, TTUR5, TUNED, "frechet", "ImageReward 0.9426, 0.8748"),
    Claim("At TTUR 5, it is preferred to DMD2 tuned", T1, TTUR5, TUNED, "reward", "ImageReward 0.9426, 0.8748"),
    Claim("TTUR 2, trained longer, beats TTUR 1", T1, TTUR2, TTUR1, "frechet", "ImageReward 0.9740, 0.9509"),
    Late(
        "TTUR 2, trained longer, has more reward than TTUR 1", T1, TTUR2, TTUR1, "reward", "ImageReward 0.9740, 0.9509"
    ),
    Claim("TTUR 5 gains CLIP score on TTUR 1", T1, TTUR5, TTUR1, "clip_score", "0.3302, 0.3292"),
    Claim(
        "TTUR 1 has more reward than TTUR 5", T1, TTUR1, TTUR5, "reward", "ImageReward 0.9509, 0.9426", reason=TRACKED
    ),
    Claim("DMD2 is worse at TTUR 2 than at TTUR 5", "3.2", DMD2, DMD2_TTUR2, "frechet"),
    Claim(
        "At TTUR 2, DMD2 gains a little, then degrades",
        "Fig. 5",
        DMD2_TTUR2,
        DMD2_TTUR2,
        "frechet",
        points=("best", -1),
    ),
    Claim("At TTUR 2, Flash-DMD improves from first point to last", "Fig. 5", TTUR2, TTUR2, "frechet", points=(-1, 0)),
    Claim("At TTUR 2, Flash-DMD is better than DMD2", "Fig. 5", TTUR2, DMD2_TTUR2, "frechet"),
    Claim(
        "Pictures vary more with the noise of high-noise steps",
        "Fig. 3",
        variation.title(999),
        variation.title(499),
        "variation",
    ),
    Claim("Stage 2 is preferred to stage 1", T3, JOINTLY, STAGE1, "reward", "ImageReward 1.0035, 0.9509"),
    Claim("Stage 2 is preferred to the teacher", T3, JOINTLY, TEACHER, "reward", "ImageReward 1.0035, 0.7143"),
    Late("Stage 2 costs CLIP score", T3, STAGE1, JOINTLY, "clip_score", "0.3292, 0.3285"),
    Late("Stage 2 costs prompts right", T3, STAGE1, JOINTLY, ACCURACY, "HPSv2 0.2968, 0.2930"),
    Late("5:1 has more reward than 1:1", T4, JOINTLY, "joint, 1:1", "reward", "ImageReward 0.9808, 0.9135"),
    Late("5:1 has more reward than 2:1", T4, JOINTLY, "joint, 2:1", "reward", "ImageReward 0.9808, 0.9315"),
    Late(
        "5:1 has more reward than 10:1",
        T4,
        JOINTLY,
        "joint, 10:1",
        "reward",
        "ImageReward 0.9808, 0.9640",
        reason=OPTIMISED,
    ),
    Claim(
        "Joint training keeps prompts right that RL alone loses", T4, JOINTLY, ALONE, ACCURACY, "HPSv2 0.2904, 0.2882"
    ),
    Claim(
        "Joint training keeps the realism that RL alone destroys", T4, JOINTLY, ALONE, "frechet", "MPS 12.764, 12.689"
    ),
    Claim(
        "Joint training has more reward than RL alone",
        T4,
        JOINTLY,
        ALONE,
        "reward",
        "ImageReward 0.9808, 0.9795",
        reason=OPTIMISED,
    ),
    Late("RL alone has the higher CLIP score", T4, ALONE, JOINTLY, "clip_score", "0.3284, 0.3275", reason=NARROW),
    Claim(
        "RL at the two noisiest steps beats all steps",
        T4,
        JOINTLY,
        ALL_NOISE,
        "reward",
        "ImageReward 0.9808, 0.9421",
        reason=SUREST,
    ),
    Late("RL at all steps has the higher CLIP score", T4, ALL_NOISE, JOINTLY, "clip_score", "0.3294, 0.3275"),
    Late("RL at all steps gets more prompts right", T4, ALL_NOISE, JOINTLY, ACCURACY, "HPSv2 0.2925, 0.2904"),
    Claim("Pixel-GAN keeps joint training real", "Fig. 7", JOINTLY, UNREAL, "frechet", "MPS 12.812, 12.764"),
    Claim(
        "With 8 steps, stage 1 is preferred to the teacher",
        "Table 6",
        EIGHT,
        TEACHER,
        "reward",
        "ImageReward 0.9159, 0.7143",
    ),
    Claim(
        "With 8 steps, stage 2 is preferred to stage 1",
        "Table 7",
        JOINTLY8,
        EIGHT,
        "reward",
        "ImageReward 1.0012, 0.9159",
    ),
    Claim(
        "Dynamic training speeds the cold start (just after its end)", "DMDR", UNPAID, STATIC, "frechet", points=COLD
    ),
    Claim("DMDR is better than DMD2, in half the loops", "DMDR", PAID, DMD2, "frechet"),
    Claim("With reward, the student is preferred to its teacher", "DMDR", PAID, TEACHER, "reward"),
    Claim("With reward, it gets more prompts right than its teacher", "DMDR", PAID, TEACHER, ACCURACY, reason=HALF_WAY),
    Claim("Joint RL raises the reward", "DMDR", PAID, UNPAID, "reward", "IS 416, 232"),
    Claim("Reward costs realism", "DMDR", UNPAID, PAID, "frechet", "FID 2.13, 6.95"),
    Claim("Reward costs recall", "DMDR", UNPAID, PAID, "recall", "0.64, 0.40"),
    Claim("The discriminator as reward makes the student better", "AdvDMD", ONLINE, UNREWARDED, "frechet"),
    Claim("The discriminator as reward gets more prompts right", "AdvDMD", ONLINE, UNREWARDED, ACCURACY),
    Claim("4 steps get more prompts right than the teacher", "AdvDMD", ONLINE, TEACHER, ACCURACY, reason=HALF_WAY),
    Claim("An online reward is hacked less than a frozen one", "AdvDMD", ONLINE, FROZEN, "frechet"),
)
