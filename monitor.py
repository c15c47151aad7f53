"""Is the run healthy? Signals logged beside the losses, preview pictures, metrics.jsonl and TensorBoard.

The README's table "What a run logs" says what each signal means and where it should lie.
"""

import json
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import metrics
import score_estimator
from diffusion import backward_simulation, guided, randn, sample_generators, sample_ode
from models import generate

COMPONENTS = {"G": "the generator G", "fake": "the score estimator", "teacher": "the teacher", "ref": "the reference", "R": "the reward model"}
COMPONENTS |= {"vae": "the VAE", "D": "SAM and D's heads", "encoder": "the text encoders"}


@torch.no_grad()
def health(x_real, latent_real, x_0, vae, teacher, L_fake, t, eps, c):
    """Signals that tell a healthy run from one about to collapse; the README explains each.

    x_real, latent_real: the batch's images, and their latents; x_0: latents of finished samples of the generator;
    t, eps, c: what L_fake (Eq. 6) was taken at.
    """
    image = vae.decode(x_0).clamp(-1, 1)
    return {
        "score_lag": L_fake.detach() / score_estimator.loss(teacher, latent_real, t, eps, c),
        "latent_mean_gap": x_0.mean() - latent_real.mean(),
        "latent_std_ratio": x_0.std() / latent_real.std(),
        "saturation": metrics.saturation(image),
        "saturation_real": metrics.saturation(x_real),
        "contrast": metrics.contrast(image),
        "contrast_real": metrics.contrast(x_real),
    }


class Preview:
    """A picture per visit: fixed prompts and noise, a row each for the undistilled teacher, the student (in stage 2 also as it came), the teacher."""

    def __init__(self, cast, source, columns=8, per_prompt=4):
        self.prompts, self.columns, self.per_prompt, self.vae = source.prompts(columns), columns, per_prompt, cast.vae
        self.c = cast.encoder.encode(self.prompts)
        self.c_same = {k: v[:2].repeat_interleave(per_prompt, 0) for k, v in self.c.items()}
        self.like, self.seed, self.S, n = cast.latent[:1], cast.config.seed, cast.S, len(cast.S)
        z = randn(self.generators("preview", columns), self.like)
        teacher = guided(cast.teacher, cast.null, cast.config.teacher_guidance)
        self.teacher = self.vae.decode(sample_ode(teacher, z, self.c, 50))
        earlier = {"undistilled": teacher} | ({"stage 1": cast.ref} if cast.ref else {})
        self.earlier = [self.vae.decode(self.rollout(denoiser, self.c, "preview", columns)) for denoiser in earlier.values()]
        self.labels = [f"{name}, {n} steps" for name in (*earlier, f"stage {cast.config.stage}")] + ["teacher, 50 steps"]

    def generators(self, purpose, n):
        return sample_generators(self.seed, 0, range(n), purpose)

    def rollout(self, denoiser, c, purpose, n):
        generators = self.generators(purpose, n)
        return backward_simulation(denoiser, randn(generators, self.like), c, self.S, generators)

    def draw(self, path, G, rank):
        """Write the grid (rank 0) and return the student's diversity: two prompts, several noises each."""
        with torch.no_grad():
            student = self.vae.decode(self.rollout(G, self.c, "preview", self.columns))
            same = self.vae.decode(self.rollout(G, self.c_same, "diversity", 2 * self.per_prompt))
        if rank == 0:
            data.save_grid(path, [*self.earlier, student, self.teacher], self.labels, self.prompts)
        return {"diversity": metrics.diversity(same, self.per_prompt)}


class HeldOut:
    """Stage 2's judges, on fixed prompts (the toy's are held out): the reward of finished pictures, and two that preference optimisation never sees.

    Reward up while a held-out judge falls by more than its standard error, three previews in a row, is reward hacking.
    """

    def __init__(self, cast, source, n=64):
        self.cast, self.judge_prompts = cast, source.judge
        self.prompts = source.held_out(0, n)[1] if source.held_out else source.prompts(n)
        self.clip, self.history = metrics.Clip(cast.config.clip, cast.encoder.device), []

    def look(self, G):
        """Mean reward, CLIP score and, where the source can judge, the share of prompts met, as "held_out_..."."""
        cast = self.cast
        images = generate(G, cast.encoder, cast.vae, self.prompts, len(cast.S), cast.config.seed).to(cast.latent.device)
        seen = {
            "reward": cast.R.judge(cast.vae.encode(images), self.prompts),
            "clip_score": self.clip.score(self.clip.features(images), self.prompts).cpu(),
        }
        if self.judge_prompts:
            seen["prompt_accuracy"] = torch.tensor(self.judge_prompts(images, self.prompts)[0]).float()
        self.history.append({k: (v.mean().item(), v.std().item() / len(v) ** 0.5) for k, v in seen.items()})
        return {f"held_out_{k}": mean for k, (mean, _) in self.history[-1].items()}

    def warning(self):
        return hacking(self.history)


def hacking(history):
    """One line that names the numbers where the last three previews look like reward hacking; else None.

    history: per preview a dict judge -> (mean, standard error), "reward" among them.
    """
    last = history[-4:]
    steps = list(zip(last, last[1:]))
    if len(steps) < 3 or not all(after["reward"][0] > before["reward"][0] for before, after in steps):
        return None
    for judge in last[-1]:
        if judge != "reward" and all(after[judge][0] < before[judge][0] - before[judge][1] for before, after in steps):
            rewards, judged = (", ".join(f"{h[k][0]:.3f}" for h in last) for k in ("reward", judge))
            return f"warning: reward hacking? The reward rises ({rewards}), the held-out {judge} falls ({judged}): raise --beta or lower --rl-ratio"
    return None


def out_of_memory(error, config):
    """One line for an allocation that failed: where, at what batch, and what helps. None for another error."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    frames, ranks = [frame for frame, _ in traceback.walk_tb(error.__traceback__)], int(os.environ.get("WORLD_SIZE", 1))
    names = [(Path(f.f_code.co_filename).name, f.f_code.co_name) for f in frames]
    ours = [name for file, name in names if file in ("train.py", "train_reward.py") or name == "assemble"]
    whole = config.stage == "reward"  # takes a rank's batch at once
    at_once, switch = (config.batch_size // ranks, "--batch-size") if whole else (config.micro_batch or config.batch_size // ranks, "--micro-batch")
    sees = not whole and config.gan == "pixel" and config.gan_weight and not config.gan_crop
    helps = {
        f"lower {switch}": at_once > 1,
        "add --checkpointing": not config.checkpointing,
        f"add --gan-crop {config.resolution // 2}": sees,
        "--optimizer adamw8bit": config.optimizer == "adamw",
        "--lora-rank 64": config.stage == 1 and not (config.lora_rank or config.fake_lora),
        "more ranks": True,
        "a lower --resolution": True,
    }
    return (
        f"out of memory in {component(frames)}{ours[-1]} with {at_once} samples at once on each of {ranks} ranks: "
        f"{', '.join(what for what, possible in helps.items() if possible)}; --dry-run computes what fits"
    )


def component(frames):
    """What of a Cast was at work in the frames down to an allocation that failed: a network, an optimizer, a backward pass; "" without a Cast."""
    cast = next((f.f_locals["cast"] for f in frames if "cast" in f.f_locals), None)
    networks = {id(getattr(cast, name)): title for name, title in COMPONENTS.items()} if cast else {}
    for f in frames:
        if "self" in f.f_locals and id(f.f_locals["self"]) in networks:
            return f"{networks[id(f.f_locals['self'])]}, in "
        if f.f_code.co_name == "update" and "name" in f.f_locals:
            return f"the optimizer step of {f.f_locals['name']}, in "
        if f.f_code.co_name.startswith("load_"):
            return f"{f.f_code.co_name}, in "
        if f.f_code.co_name == "backward":
            return "a backward pass, in "
    return ""


class Log:
    """metrics.jsonl, TensorBoard scalars and the progress bar; rank 0 alone writes."""

    def __init__(self, run, rank, config, progress):
        self.path, self.on = run / "metrics.jsonl", rank == 0
        if self.on:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["loops"] <= progress["loops"]]  # a kill may tear the last
            self.path.write_text("".join(line + "\n" for line in kept))
            self.board = SummaryWriter(run / "tensorboard", purge_step=progress["loops"] + 1)
        self.progress = tqdm(initial=progress["loops"], total=config.iterations, disable=not self.on, desc=f"stage {config.stage}", mininterval=2)

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


def mean(dicts):
    """The mean of dicts of scalars with the same keys, key by key."""
    return {k: sum(d[k] for d in dicts) / len(dicts) for k in dicts[0]}


def average(values, ranks):
    """Mean over ranks of a dict of scalars (the same keys on every rank)."""
    stacked = torch.stack([torch.as_tensor(v, dtype=torch.float32).cpu() for v in values.values()])
    if ranks > 1:
        stacked = stacked.to("cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(stacked)
        stacked /= ranks
    return dict(zip(values, stacked.tolist()))
