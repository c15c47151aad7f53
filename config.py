"""Every setting of a run: one flat table. A field's comment is its --help."""

import argparse
import inspect
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass
class Config:
    preset: str = "toy"  # a row of PRESETS; flags given beside it override it
    stage: int | str = 1  # 1: distillation (Algorithm 1, lines 1-26); 2: joined by preference optimisation (27-32); reward: trains its judge
    model: str = "toy/sdxl"  # the teacher: a diffusers pipeline folder, or a hub name
    data: str = "toy"  # "toy", a folder of images with metadata.jsonl (file_name, text), or WebDataset shards ("shards/{000..127}.tar")
    prompts: str = ""  # a text file of prompts, one per line, for G; default: the captions of the data
    cache_latents: str = ""  # folder to keep the VAE's latents of --data in, for --gan latent or online, or --gan-reals vae
    size_condition: str = "square"  # SDXL's size conditions: square = an uncropped square, as at sampling; original = those of the prompt's picture
    resolution: int = 64  # side of the square training images, pixels
    out: str = ""  # run folder; default runs/DATE-TIME
    iterations: int = 400  # loops of Algorithm 1; the generator moves in every TTUR-th
    batch_size: int = 16  # global: over all ranks
    micro_batch: int = 0  # samples of a rank that pass the networks at once, in updates of either kind (gradients add up); 0 = all
    student_steps: int = 4  # K, the student's sampling steps: 4 or 8
    dm_steps: str = "high"  # student steps that the DM loss trains: high = all but the last (timestep-aware), or all
    ttur: int = 1  # loops per generator update (Algorithm 1, line 12)
    ema: float = 0.9  # lambda of Eq. 11; 1 = no pull
    gan: str = "pixel"  # pixel = Eq. 9, 10 on SAM's features; latent = DMD2's, Eq. 5, 7 (the baseline); online = AdvDMD's reward
    gan_weight: float = 0.03  # lambda of Algorithm 1, line 16 (--gan online: weight of the policy loss); 0 = no GAN
    critic_weight: float = 0.01  # --gan latent, online: weight of Eq. 7 beside Eq. 6, as in DMD2
    gan_loss: str = "hinge"  # hinge or logistic
    adv_reading: str = "b"  # x_adv: a = re-noised finished rollout (Eq. 9), b = the rollout's last step (Algorithm 1)
    gan_crop: int = 0  # pixels: D sees a random square of this side, the same in both; less memory for the VAE. 0 = whole pictures
    gan_reals: str = "raw"  # what D sees as real: raw images, or their vae round trip
    sam: str = "toy/sam"  # image encoder of D: a folder, or a segment_anything checkpoint sam_vit_*.pth
    clip: str = "toy/clip"  # CLIP that evaluation measures with
    guidance: float = 3.0  # w, the guidance scale of the real score in Eq. 3
    teacher_guidance: float = 5.0  # at which the multi-step teacher is sampled, for comparison: previews, evaluate.py
    renoise: tuple = (0.02, 0.98)  # LOW,HIGH: the share of the noise range that the DM loss's t is drawn from
    lr: float = 4e-5  # generator's AdamW learning rate
    fake_lr: float = 3e-4  # score estimator's
    d_lr: float = 1e-3  # discriminator heads'
    lr_schedule: str = "linear"  # of G's rates, by preference too, and the score estimator's: constant, or linear = falling to 0 over --iterations
    optimizer: str = "adamw"  # of all three: adamw, or adamw8bit = torchao's, moments in 8 bits; needs a C++ compiler
    weight_decay: float = 0.01  # of all three
    clip_grad: float = 1.0  # largest gradient norm of G and of the score estimator
    init: str = ""  # stage 2: the stage-1 run to go on from; default the newest
    reward: str = ""  # stage 2, DMDR: folder of the latent reward model; default "lrm" beside the model (toy/lrm). DMDR: or "clip"
    rl_ratio: int = 5  # stage 2: preference updates per distillation update; --iterations counts both
    rl_steps: str = "high"  # stage 2: student steps whose candidates are judged: high = the two noisiest, or all
    candidates: int = 4  # stage 2: k, candidates per step; --gan online: rollouts per prompt
    carry: str = "random"  # stage 2: the candidate that the next step starts from: random, or best
    pair_threshold: float = 0.45  # stage 2: a pair is kept when the softmax over best and worst is this far apart
    beta: float = 0.05  # stage 2: beta of Eq. 12; H is a sum over dimensions
    ratio_clip: float = 0.0  # stage 2: hold the ratio of each mean density to the reference's within 1 +- this (LPO: 0.1); 0 = off
    rl_lr: float = 1e-5  # stage 2: learning rate of the preference updates
    rl_only: bool = False  # stage 2: no distillation beside it (the paper's post-training)
    lora_rank: int = 0  # G and the score estimator as two LoRAs of this rank on one frozen teacher; 0 = copies of their own
    fake_lora: int = 0  # DMDR: rank of the LoRA that makes the score estimator out of the frozen teacher; 0 = a copy of its own
    dynamic: int = 0  # DMDR: K, generator updates of the dynamic cold start (DynaDG, DynaRS); 0 = none. Needs --fake-lora
    real_scale: float = 0.75  # DMDR: r_0, the LoRA's scale in the real score at the start
    reward_weight: float = 0.0  # DMDR: of the reward loss beside the DM loss, after the cold start; 0 = none
    reward_margin: float = 8.0  # DMDR: m, the score above which the reward loss asks for no more
    rl_after: int = 100  # --gan online: generator updates before reinforcement begins
    rl_gate: float = 0.6  # --gan online: reinforcement waits while D judges fewer than this share of unseen latents right
    pairs: str = ""  # stage reward: a folder of picture pairs, metadata.jsonl with caption, jpg_0_file_name, jpg_1_file_name, label_0
    reward_lr: float = 1e-5  # stage reward: learning rate
    judge: str = ""  # --gan online: a run whose discriminator, frozen, is the reward; default the run's own, which goes on learning
    compile: bool = False  # torch.compile the three denoisers; needs a C++ compiler
    checkpointing: bool = False  # recompute activations in backward passes: less memory, about a third more time
    seed: int = 0  # of the whole run
    save_every: int = 200  # loops between checkpoints
    keep: int = 2  # checkpoints kept: the newest, and one to go back to
    preview_every: int = 100  # loops between preview pictures; 0 = none
    log_every: int = 10  # loops between lines of metrics.jsonl
    workers: int = 0  # data-loading processes per rank
    dry_run: bool = False  # print what the run needs (memory, FLOPs, GPU-hours at SDXL's size) and end; no weights, no GPU
    gpus: int = 8  # --dry-run: how many; must divide the batch
    gpu_memory: float = 80.0  # --dry-run: GB of each
    gpu_tflops: float = 400.0  # --dry-run: sustained bf16 TFLOP/s of each
    resume: bool = False  # go on from the newest checkpoint in --out
    overwrite: bool = False  # replace the run in --out


# ASSUMPTION: the paper prints neither learning rates nor loss weights: SDXL's lr and guidance are DMD2's, its fake_lr is 5 times lr,
# beta is LPO's, SD3's rates are ours, the rest the toy's.
_SDXL = {
    "model": "stabilityai/stable-diffusion-xl-base-1.0",
    "resolution": 1024,
    "sam": "sam_vit_b_01ec64.pth",
    "clip": "openai/clip-vit-base-patch32",
    "guidance": 8.0,
    "lr": 5e-7,
    "fake_lr": 2.5e-6,
    "lr_schedule": "constant",
    "checkpointing": True,
}
_SD3 = _SDXL | {
    "model": "stabilityai/stable-diffusion-3-medium-diffusers",
    "guidance": 7.0,
    "teacher_guidance": 7.0,  # Table 2
    "lora_rank": 64,
    "lr": 1e-5,
    "fake_lr": 2e-5,
}
_STAGE2 = _SDXL | {"stage": 2, "rl_lr": 2e-7, "beta": 0.0076}
_DMD2 = {"gan": "latent", "gan_weight": 5e-3, "dm_steps": "all", "ttur": 5, "ema": 1.0}  # as the paper describes it (3.1, 3.2); weights: DMD2's
PRESETS = {
    "toy": {},
    "dmd2": _DMD2 | {"iterations": 2000},  # the toy
    "dmdr": {"gan_weight": 0.0, "dm_steps": "all", "ttur": 5, "ema": 1.0, "fake_lora": 16, "dynamic": 100, "reward_weight": 0.1, "iterations": 2000},
    "advdmd": _DMD2 | {"gan": "online", "gan_weight": 1.0, "iterations": 2000},
    "sdxl-dmd2": _SDXL | _DMD2 | {"batch_size": 128, "iterations": 24000},  # Table 1
    "sdxl-4step": _SDXL | {"batch_size": 64, "iterations": 1000},  # Table 1
    "sdxl-4step-ttur2": _SDXL | {"batch_size": 64, "iterations": 4000, "ttur": 2},  # Table 1; 8,000 too
    "sdxl-4step-ttur5": _SDXL | {"batch_size": 64, "iterations": 18000, "ttur": 5},  # Table 1
    "sdxl-8step": _SDXL | {"batch_size": 48, "iterations": 3000, "ttur": 2, "student_steps": 8},  # Table 6; 6,000 too
    "sd3-4step": _SD3 | {"batch_size": 32, "iterations": 4000, "ttur": 2},  # Table 2; 7,000 too. Rank and rates are not printed
    "sdxl-stage2": _STAGE2 | {"batch_size": 64, "iterations": 5000},  # Tables 3, 4. ASSUMPTION: the batch is stage 1's
    "sdxl-8step-stage2": _STAGE2 | {"batch_size": 48, "iterations": 3000, "student_steps": 8},  # Table 7; 6,000 too
}

CHOICES = {
    "stage": (1, 2, "reward"),
    "size_condition": ("square", "original"),
    "rl_steps": ("high", "all"),
    "carry": ("random", "best"),
    "student_steps": (4, 8),
    "dm_steps": ("high", "all"),
    "lr_schedule": ("constant", "linear"),
    "gan": ("pixel", "latent", "online"),
    "gan_loss": ("hinge", "logistic"),
    "adv_reading": ("a", "b"),
    "gan_reals": ("raw", "vae"),
    "optimizer": ("adamw", "adamw8bit"),
    "preset": tuple(PRESETS),
}


def _range(text):
    low, high = map(float, text.split(","))
    if not 0 <= low < high <= 1:
        raise ValueError
    return low, high


def _stage(text):
    return int(text) if text.isdigit() else text


def at_least(low):
    """An argparse type: a whole number, `low` or more."""

    def number(text):
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {value}")
        return value

    return number


def parse(argv=None):
    """Command line -> Config: the defaults, then the preset, then the flags given. Exits with status 2 on a bad one."""
    parser = argparse.ArgumentParser(description="Train a few-step student: Flash-DMD, Algorithm 1.")
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for f in fields(Config):
        kind = {"type": {tuple: _range, int | str: _stage}.get(f.type, f.type), "choices": CHOICES.get(f.name)}
        kind = {"action": "store_true"} if f.type is bool else kind
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, default=None, help=f"{notes[f.name]} (default: {f.default})".replace("%", "%%"), **kind)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not given.get("out"):
        parser.error("torchrun --max-restarts needs --out: the folder in which a restart goes on")
    launch, saved = Path(given.get("out", "")) / "launch", Path(given.get("out", "")) / "config.json"
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if again and given.get("out") and launch.is_file() and launch.read_text() == os.environ.get("TORCHELASTIC_RUN_ID"):
        given["resume"] = True  # this very torchrun has begun the run, and has started us again
    if given.get("resume") and given.get("out") and saved.is_file():  # a run goes on with its own settings, but for the flags given
        try:
            before = json.loads(saved.read_text())
        except ValueError:
            parser.error(f"{saved} is torn: give its settings as flags, and --overwrite or another --out")
        before = {k: v for k, v in before.items() if k in notes}  # one that is no more was written by an older version
        given = {k: v for k, v in before.items() if k not in ("preset", "overwrite", "renoise")} | {"renoise": tuple(before["renoise"])} | given
    config = Config(**{**PRESETS[given.get("preset", "toy")], **given})
    weights = ("gan_weight", "critic_weight", "reward_weight", "weight_decay")
    for name in ("seed", "workers", "micro_batch", "gan_crop", "lora_rank", "fake_lora", "dynamic", "rl_after", "preview_every", *weights):
        if getattr(config, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    for name in ("lr", "fake_lr", "d_lr", "rl_lr", "reward_lr", "beta", "clip_grad", "gpu_memory", "gpu_tflops"):
        if getattr(config, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    for name in ("iterations", "batch_size", "ttur", "save_every", "keep", "log_every", "resolution", "rl_ratio", "gpus"):
        if getattr(config, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if config.candidates < 2:
        parser.error("--candidates must be at least 2: a pair needs a best and a worst")
    if not 0 <= config.pair_threshold < 1:
        parser.error("--pair-threshold must lie in [0, 1)")
    if not 0 <= config.rl_gate <= 1:
        parser.error("--rl-gate must lie in [0, 1]")
    if not 0 <= config.ratio_clip < 1:
        parser.error("--ratio-clip must lie in [0, 1)")
    if config.cache_latents and config.gan == "pixel" and config.gan_weight and config.gan_reals == "raw":
        parser.error("--cache-latents: Pixel-GAN looks at the pictures themselves: leave it out, or pass --gan-reals vae")
    if config.judge and not (config.gan == "online" and config.gan_weight):
        parser.error("--judge is the reward of --gan online, and needs a --gan-weight")
    if config.size_condition == "original" and (config.prompts or config.data == "toy"):
        parser.error("--size-condition original needs pictures with captions of their own: give --data, and no --prompts")
    if config.cache_latents and config.data == "toy":
        parser.error("--cache-latents needs --data, a folder or shards: the toy world draws new scenes without end")
    if config.gan_crop > config.resolution:
        parser.error("--gan-crop must not be larger than --resolution")
    if config.dynamic and not config.fake_lora:
        parser.error("--dynamic needs --fake-lora: DynaDG scales the score estimator's LoRA")
    if config.lora_rank and config.fake_lora:
        parser.error("--lora-rank has a LoRA for the score estimator already: leave --fake-lora out")
    if config.fake_lora and config.ema < 1:
        parser.error("--fake-lora needs --ema 1: Eq. 11 pulls whole weights, not a LoRA's")
    if not 0 <= config.ema <= 1:
        parser.error("--ema must lie in [0, 1]")
    return config
