"""The health of a run: signals logged beside the losses, preview pictures, metrics.jsonl and TensorBoard.

docs/monitoring.md explains each signal and its healthy range.
"""

import errno
import json
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import score_estimator
from diffusion import backward_simulation, guided, noise_to_step, randn, sample_generators, sample_ode
from engine import metrics
from engine.errors import UserError
from engine.pictures import generate, in_steps, save_grid


class Means(dict):
    """A loop's {name: value} to log, each a mean over its micro-batches."""

    def add(self, weight, **values):
        """Add a micro-batch's values, `weight` of the rank's batch."""
        for name, value in values.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            self[name] = self.get(name, 0) + weight * value


def finish(G, x, i, c, S, generators):
    """x = G(x_τ, S[i]) rolled out to the end of S -> x_0, (B, C, h, w). generators: those of the rollout so far."""
    x_next = noise_to_step(G.schedule, x, S, i + 1, generators)
    return backward_simulation(G, x_next, c, S, generators, i + 1)


@torch.no_grad()
def health(nets, batch, x_0, fake_loss, t, eps):
    """Signals of a run that is about to collapse, explained in docs/monitoring.md -> {name: value}.

    x_0 (B, C, h, w): latents of finished samples of G; fake_loss: Eq. 6, taken at t (B,) and eps (B, C, h, w).
    """
    x_real = nets.pictures(batch.x_real)
    latent_real = nets.latents(batch.x_real)
    image = nets.vae.decode(x_0).clamp(-1, 1)
    return {
        "score_lag": fake_loss / score_estimator.loss(nets.teacher, latent_real, t, eps, batch.c),
        "latent_mean_gap": x_0.mean() - latent_real.mean(),
        "latent_std_ratio": x_0.std() / latent_real.std(),
        "saturation": metrics.saturation(image),
        "saturation_real": metrics.saturation(x_real),
        "contrast": metrics.contrast(image),
        "contrast_real": metrics.contrast(x_real),
    }


class Preview:
    """Pictures of fixed prompts and noise: undistilled teacher, stage-1 student (in stage 2), student, teacher."""

    def __init__(self, nets, source, columns=8, per_prompt=4):
        """columns: prompts; per_prompt: pictures of one prompt that measure diversity."""
        self.columns = columns
        self.per_prompt = per_prompt
        self.vae = nets.vae
        self.S = nets.S
        self.like = nets.latent[:1]
        self.seed = nets.config.seed
        self.prompts = source.prompts(columns)
        self.c = nets.encoder.encode(self.prompts)
        self.c_same = {k: v[:2].repeat_interleave(per_prompt, 0) for k, v in self.c.items()}
        z = randn(self.generators("preview", columns), self.like)
        teacher = guided(nets.teacher, nets.null, nets.config.teacher_guidance)
        self.teacher = self.vae.decode(sample_ode(teacher, z, self.c, 50))
        earlier = {"undistilled": teacher}
        if nets.ref:
            earlier["stage 1"] = nets.ref
        rollouts = (self.rollout(denoiser, self.c, "preview", columns) for denoiser in earlier.values())
        self.earlier = [self.vae.decode(x_0) for x_0 in rollouts]
        few_step = (*earlier, f"stage {nets.config.stage}")
        self.labels = [*(f"{name}, {in_steps(len(self.S))}" for name in few_step), "teacher, 50 steps"]

    def generators(self, purpose, n):
        return sample_generators(self.seed, 0, range(n), purpose)

    def rollout(self, denoiser, c, purpose, n):
        generators = self.generators(purpose, n)
        return backward_simulation(denoiser, randn(generators, self.like), c, self.S, generators)

    def draw(self, path, G, rank):
        """Write the grid (rank 0) -> the student's diversity over two prompts with several noises each."""
        with torch.no_grad():
            student = self.vae.decode(self.rollout(G, self.c, "preview", self.columns))
            same = self.vae.decode(self.rollout(G, self.c_same, "diversity", 2 * self.per_prompt))
        if rank == 0:
            save_grid(path, [*self.earlier, student, self.teacher], self.labels, self.prompts)
        return {"diversity": metrics.diversity(same, self.per_prompt)}


class HeldOut:
    """Stage 2's scores on fixed prompts, the toy's held-out ones: the reward, and two scores that RL does not train.

    Reward hacking: the reward rises while such a score falls by more than its standard error, three previews in a row.
    """

    def __init__(self, nets, source, n=64):
        self.nets = nets
        self.judge = source.judge
        self.prompts = source.held_out(0, n)[1] if source.held_out else source.prompts(n)
        self.clip = metrics.Clip(nets.config.clip, nets.encoder.device)
        self.history = []

    def look(self, G):
        """Mean reward, CLIP score and, where the source can judge pictures, prompt accuracy, as "held_out_..."."""
        nets = self.nets
        images = generate(G, nets.encoder, nets.vae, self.prompts, len(nets.S), nets.config.seed).to(nets.latent.device)
        seen = {
            "reward": nets.R.score_finished(nets.vae.encode(images), self.prompts),
            "clip_score": self.clip.score(self.clip.features(images), self.prompts).cpu(),
        }
        if self.judge:
            seen["prompt_accuracy"] = torch.tensor(self.judge(images, self.prompts)[0]).float()
        self.history.append({k: (v.mean().item(), v.std().item() / len(v) ** 0.5) for k, v in seen.items()})
        return {f"held_out_{k}": mean for k, (mean, _) in self.history[-1].items()}

    def warning(self):
        return hacking(self.history)


def hacking(history):
    """A warning with the numbers where the last three previews look like reward hacking; else None.

    history: per preview a dict score -> (mean, standard error), "reward" among them.
    """
    last = history[-4:]
    steps = list(zip(last, last[1:]))
    if len(steps) < 3 or not all(after["reward"][0] > before["reward"][0] for before, after in steps):
        return None
    path = lambda score: ", ".join(f"{h[score][0]:.3f}" for h in last)  # noqa: E731
    for score in last[-1]:
        if score != "reward" and all(after[score][0] < before[score][0] - before[score][1] for before, after in steps):
            seen = f"The reward rises ({path('reward')}), the held-out {score} falls ({path(score)})"
            return f"warning: reward hacking? {seen}: raise --beta or lower --rl-ratio"
    return None


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def error_line(error, config):
    """The one line printed for a UserError, a failed allocation or a full disk; None for another error, a bug."""
    if isinstance(error, UserError):
        return str(error).split("UserError: ")[-1].strip()  # a loader process sends its traceback along
    if isinstance(error, OSError) and error.errno in DISK:
        return f"cannot write {error.filename or 'to disk'} ({error.strerror}): make room, and go on with --resume"
    if isinstance(error, FileNotFoundError) and config and not Path(config.out).is_dir():
        return f"{config.out} was deleted or moved while it was trained: its checkpoints are where it is now"
    return out_of_memory(error, config)


def out_of_memory(error, config):
    """One line for a failed allocation: what was running, where, at what batch, what helps. None for another error."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    at_once = config.batch_size // ranks
    switch = "--batch-size"
    if config.stage != "reward":  # it takes a rank's batch at once
        at_once = config.micro_batch or at_once
        switch = "--micro-batch"
    held = config.stage != "reward" and not config.cache_text  # text encoders
    pixel_gan = config.stage != "reward" and config.method == "flash" and config.gan_weight
    helps = {
        f"lower {switch}": at_once > 1,
        "add --checkpointing": not config.checkpointing,
        f"add --gan-crop {config.resolution // 2}": pixel_gan and not config.gan_crop,
        "--optimizer adamw8bit": config.optimizer == "adamw",
        "--lora-rank 64": config.stage == 1 and config.method != "dmdr" and not config.lora_rank,
        "--cache-text FOLDER": held and (config.prompts or config.data != "toy"),
        "more ranks": True,
        "a lower --resolution": True,
    }
    remedies = ", ".join(remedy for remedy, possible in helps.items() if possible)
    samples = f"with {at_once} samples at once on each of {ranks} ranks"
    return f"out of memory in {where(error)} {samples}: {remedies}; --dry-run computes what fits"


def where(error):
    """Where an error arose: the innermost note of engine.models.at_work, and the line of the training loop."""
    frames = traceback.extract_tb(error.__traceback__)
    notes = getattr(error, "__notes__", [])
    if notes:
        what = notes[0]
    elif any(f.name == "backward" for f in frames):
        what = "a backward pass"
    else:
        what = "a computation"
    files = [(Path(f.filename), f.lineno) for f in frames]
    loops = [(path.name, line) for path, line in files if path.name == "train.py" or path.parent.name == "siblings"]
    if not loops:
        return what
    name, line = loops[-1]
    return f"{what}, {name} line {line},"


class Log:
    """metrics.jsonl, TensorBoard scalars and the progress bar, all of rank 0 alone."""

    def __init__(self, run, rank, config, progress):
        self.path = run / "metrics.jsonl"
        self.on = rank == 0
        loops = progress["loops"]
        if self.on:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            whole = [line for line in lines if line.endswith("}")]  # a kill may tear the last one
            kept = [line for line in whole if json.loads(line)["loops"] <= loops]
            self.path.write_text("".join(line + "\n" for line in kept))
            self.board = SummaryWriter(run / "tensorboard", purge_step=loops + 1)
        bar = {"initial": loops, "total": config.iterations, "desc": f"stage {config.stage}"}
        self.progress = tqdm(disable=not self.on, mininterval=2, **bar)

    def write(self, progress, values):
        if self.on:
            if torch.cuda.is_available():
                values = values | {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
            values = {k: round(float(v), 6) for k, v in values.items()}
            with self.path.open("a") as f:
                f.write(json.dumps(progress | values) + "\n")
            for k, v in values.items():
                self.board.add_scalar(k, v, progress["loops"])

    def bar(self, loop, values):
        names = ("dm_loss", "adv_loss", "fake_loss", "d_accuracy", "reward", "kl_to_reference", "reward_loss")
        shown = {k: f"{float(values[k]):.3f}" for k in names if k in values}
        self.progress.set_postfix(shown, refresh=False)
        self.progress.update(loop - self.progress.n)

    def warn(self, line):
        if self.on and line:
            self.progress.write(line)

    def close(self):
        self.progress.close()
        if self.on:
            self.board.close()


def average(values, ranks):
    """Mean over ranks of a dict of scalars (the same keys on every rank)."""
    stacked = torch.stack([torch.as_tensor(v, dtype=torch.float32).cpu() for v in values.values()])
    if ranks > 1:
        stacked = stacked.to("cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(stacked)
        stacked /= ranks
    return dict(zip(values, stacked.tolist()))
