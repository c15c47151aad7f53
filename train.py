"""Flash-DMD training: Algorithm 1 of the paper.

    python train.py --stage 1                         one process; on the toy world by default
    torchrun --nproc-per-node 8 train.py --stage 1    FSDP2 over 8 ranks

The mathematics lives in dmd.py, score_estimator.py, pixel_gan.py and diffusion.py; this file says in which order it happens.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import data
import dmd
import metrics
import pixel_gan
import score_estimator
from config import parse
from diffusion import backward_simulation, guided, rand, randn, renoise, sample_generators, sample_ode, times
from models import VAE, PromptEncoder, UserError, load_denoiser, load_sam, shard


GIVE_UP_AFTER = 10  # loops in a row with a non-finite loss or gradient


def train(config):
    """Run stage 1 as `config` says. Returns the run folder. Raises UserError for what a user can mend."""
    rank, ranks, device = start_process()
    if config.batch_size % ranks:
        raise UserError(f"--batch-size {config.batch_size} is not divisible by {ranks} ranks")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    source = data.source(config.data, config.resolution, config.seed)
    encoder = PromptEncoder(config.model, config.resolution, device, dtype)
    vae = VAE(config.model, device)
    latent = torch.empty(config.batch_size // ranks, vae.channels, config.resolution // vae.factor, config.resolution // vae.factor, device=device)

    teacher = load_denoiser(config.model, device, dtype)  # μ_real
    teacher.net.to(dtype).eval().requires_grad_(False)
    G = load_denoiser(config.model, device, dtype)  # line 1
    fake = load_denoiser(config.model, device, dtype)  # line 2
    for player in (G, fake):
        player.net.train()
        if ranks > 1 or device.type == "cuda":
            shard(player.net, dtype)
    D = None
    if config.gan_weight > 0:  # line 3
        torch.manual_seed(config.seed)
        D = pixel_gan.PixelDiscriminator(load_sam(config.sam, device)).to(device)
    guided_teacher = guided(teacher, encoder.null(), config.guidance)

    adam = {"betas": (0.9, 0.999), "weight_decay": config.weight_decay}
    players = {
        "G": (G.net, torch.optim.AdamW(G.net.parameters(), lr=config.lr, **adam)),
        "fake": (fake.net, torch.optim.AdamW(fake.net.parameters(), lr=config.fake_lr, **adam)),
    }
    if D is not None:
        players["D"] = (D, torch.optim.AdamW(D.parameters(), lr=config.d_lr, **adam))

    run = open_run(config, rank)
    progress = {"loops": 0, "generator_updates": 0, "samples": 0, "passes": 0, "skipped_updates": 0, "seconds": 0.0}
    if config.resume and (newest := checkpoint.newest(run)):
        progress = checkpoint.load(newest, players)
    log = Log(run, rank, config.iterations, progress)
    preview = Preview(config, source, encoder, vae, teacher, guided_teacher, latent, device) if config.preview_every else None

    S = teacher.schedule.steps(config.student_steps)  # τ_K > ... > τ_1
    last = len(S) - 1
    share = config.batch_size // ranks
    firsts = range(progress["loops"] * config.batch_size + rank * share, config.iterations * config.batch_size, config.batch_size)
    batches = data.batches(source, [range(first, first + share) for first in firsts], config.workers)
    bad_loops, began = 0, time.time() - progress["seconds"]

    for loop in range(progress["loops"] + 1, config.iterations + 1):  # line 4
        draw = lambda purpose: sample_generators(config.seed, loop, index.tolist(), purpose)  # noqa: B023, E731
        x_real, prompts, index = next(batches)  # line 7
        x_real, c = x_real.to(device), encoder.encode(prompts)
        passes_before = G.passes + fake.passes + teacher.passes
        ok, logged = True, {}

        # Lines 5-10. The timestep-aware part: x, for the DM loss, starts from any student step but the last.
        rollout = draw("rollout")
        z = randn(rollout, latent)
        i = int(np.random.default_rng([config.seed, loop]).integers(last))
        x_tau = backward_simulation(G, z, c, S, rollout, 0, i)
        updates_G = loop % config.ttur == 0  # line 12
        with torch.set_grad_enabled(updates_G):
            x = G(x_tau, times(S[i], x_tau), c)

        if updates_G:  # lines 13-14, Eq. 4
            noise = draw("renoise")
            low, high = config.renoise
            t = teacher.schedule.t_at(low + (high - low) * rand(noise, device))
            L_dmd = dmd.loss(x, dmd.gradient(guided_teacher, fake, x, t, randn(noise, x), c))
            L_dmd.backward()
            logged["dm_loss"] = L_dmd.detach()
        x = x.detach()  # line 20, before the rest of the rollout re-uses it

        if D is not None:  # lines 9, 11: x_adv at the last step, whose input is a detached rollout (Eq. 8)
            x_last = backward_simulation(G, renoise(G.schedule, x, S, i + 1, rollout), c, S, rollout, i + 1, last)
            if config.adv_reading == "a":  # Eq. 9: finish the rollout, re-noise x_0, denoise again
                x_0 = backward_simulation(G, x_last, c, S, rollout, last)
                x_last = renoise(G.schedule, x_0, S, last, rollout)
            with torch.set_grad_enabled(updates_G):
                x_adv = G(x_last, times(S[last], x_last), c)
                image = vae.decode(x_adv)
                features = D.features(image)
            if updates_G:  # lines 15-16, Eq. 9
                D.requires_grad_(False)
                L_adv = pixel_gan.generator_loss(D(features), config.gan_loss)
                (config.gan_weight * L_adv).backward()
                D.requires_grad_(True)
                logged["adv_loss"] = L_adv.detach()

        if updates_G:  # lines 17-18
            loss = sum(logged.values())
            logged["g_norm"], stepped = update(*players["G"], loss, config.clip_grad)
            if stepped:
                score_estimator.pull(fake.net.parameters(), G.net.parameters(), config.ema)  # Eq. 11
                progress["generator_updates"] += 1
            ok &= stepped

        # Lines 21-24, Eq. 6: the score estimator follows x.
        noise = draw("fake")
        t, eps = teacher.schedule.t_at(rand(noise, device)), randn(noise, x)
        L_fake = score_estimator.loss(fake, x, t, eps, c)
        L_fake.backward()
        logged["fake_loss"] = L_fake.detach()
        logged["fake_norm"], stepped = update(*players["fake"], L_fake, config.clip_grad)
        ok &= stepped

        if D is not None:  # lines 25-26, Eq. 10: D judges the same pictures, detached
            reals = vae.decode(vae.encode(x_real)) if config.gan_reals == "vae" else x_real
            real_logits = D(D.features(reals))
            fake_logits = D([f.detach() for f in features])
            L_D = pixel_gan.discriminator_loss(real_logits, fake_logits, config.gan_loss)
            L_D.backward()
            average_gradients(D, ranks)
            logged |= {"d_loss": L_D.detach(), "d_accuracy": pixel_gan.accuracy(real_logits, fake_logits)}
            _, stepped = update(*players["D"], L_D)
            ok &= stepped

        passes = G.passes + fake.passes + teacher.passes - passes_before
        progress |= {
            "loops": loop,
            "samples": progress["samples"] + config.batch_size,
            "passes": progress["passes"] + passes * ranks,
            "skipped_updates": progress["skipped_updates"] + (not ok),
            "seconds": time.time() - began,
        }
        if loop % config.log_every == 0 or loop == config.iterations:
            logged |= health(x_real, x, x_adv if D is not None else None, vae, teacher, L_fake, t, eps, c)
            log.write(progress, average(logged, ranks))
        log.bar(loop, logged)
        if preview and (loop % config.preview_every == 0 or loop == config.iterations):
            log.write(progress, preview.draw(run / f"preview-{loop:06d}.png", G, S, rank))
        bad_loops = 0 if ok else bad_loops + 1
        if loop % config.save_every == 0 or loop == config.iterations or bad_loops == GIVE_UP_AFTER:
            checkpoint.save(run, players, progress)
        if bad_loops == GIVE_UP_AFTER:
            raise UserError(f"{GIVE_UP_AFTER} loops in a row with a non-finite loss or gradient; saved in {run} (lower the learning rates)")
    log.close()
    return run


# ------------------------------------------------------------------------------------------- one update


def update(module, optimizer, loss, max_norm=float("inf")):
    """One optimizer step on the gradients at hand; none where loss or gradient is not finite. -> (gradient norm, stepped)."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
    if dist.is_initialized():  # all ranks skip, or none
        finite = finite.int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, bool(finite)


def average_gradients(module, ranks):
    """Mean gradient over ranks, for D's heads: they are small, so every rank holds them whole."""
    if ranks > 1:
        for p in module.parameters():
            dist.all_reduce(p.grad)
            p.grad /= ranks


# -------------------------------------------------------------------------------------- looking at a run


@torch.no_grad()
def health(x_real, x, x_adv, vae, teacher, L_fake, t, eps, c):
    """Signals that tell a healthy run from one about to collapse; the README explains each."""
    latent_real = vae.encode(x_real)
    x = x if x_adv is None else x_adv.detach()
    image = vae.decode(x)
    return {
        "score_lag": L_fake.detach() / score_estimator.loss(teacher, latent_real, t, eps, c),
        "latent_mean_gap": x.mean() - latent_real.mean(),
        "latent_std_ratio": x.std() / latent_real.std(),
        "saturation": metrics.saturation(image),
        "saturation_real": metrics.saturation(x_real),
        "contrast": metrics.contrast(image),
        "contrast_real": metrics.contrast(x_real),
    }


class Preview:
    """A picture per visit: fixed prompts and noise, a row each for the teacher, the undistilled teacher and the student."""

    def __init__(self, config, source, encoder, vae, teacher, guided_teacher, latent, device, columns=8, per_prompt=4):
        self.prompts, self.columns, self.per_prompt, self.vae = source.prompts(columns), columns, per_prompt, vae
        self.c = encoder.encode(self.prompts)
        self.c_same = {k: v[:2].repeat_interleave(per_prompt, 0) for k, v in self.c.items()}
        self.like, self.seed = latent[:1], config.seed
        self.S, n = teacher.schedule.steps(config.student_steps), config.student_steps
        self.teacher_rows = [
            vae.decode(sample_ode(guided_teacher, randn(self.generators("preview", columns), self.like), self.c, 50)),
            vae.decode(self.rollout(guided_teacher, self.c, "preview", columns)),
        ]
        self.labels = ["teacher, 50 steps", f"undistilled, {n} steps", f"student, {n} steps"]

    def generators(self, purpose, n):
        return sample_generators(self.seed, 0, range(n), purpose)

    def rollout(self, denoiser, c, purpose, n):
        generators = self.generators(purpose, n)
        return backward_simulation(denoiser, randn(generators, self.like), c, self.S, generators)

    def draw(self, path, G, S, rank):
        """Write the grid (rank 0) and return the student's diversity: two prompts, several noises each."""
        with torch.no_grad():
            student = self.vae.decode(self.rollout(G, self.c, "preview", self.columns))
            same = self.vae.decode(self.rollout(G, self.c_same, "diversity", 2 * self.per_prompt))
        if rank == 0:
            data.save_grid(path, [*self.teacher_rows, student], self.labels, self.prompts)
        return {"diversity": metrics.diversity(same, self.per_prompt)}


class Log:
    """metrics.jsonl, TensorBoard scalars and the progress bar; rank 0 alone writes."""

    def __init__(self, run, rank, total, progress):
        self.path, self.on = run / "metrics.jsonl", rank == 0
        if self.on:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if json.loads(line)["loops"] <= progress["loops"]]
            self.path.write_text("".join(line + "\n" for line in kept))
            self.board = SummaryWriter(run / "tensorboard", purge_step=progress["loops"] + 1)
        self.progress = tqdm(initial=progress["loops"], total=total, disable=not self.on, desc="stage 1", mininterval=2)

    def write(self, progress, values):
        if self.on:
            values = {k: round(float(v), 6) for k, v in values.items()}
            with self.path.open("a") as f:
                f.write(json.dumps(progress | values) + "\n")
            for k, v in values.items():
                self.board.add_scalar(k, v, progress["loops"])

    def bar(self, loop, values):
        shown = {k: f"{float(v):.3f}" for k, v in values.items() if k in ("dm_loss", "adv_loss", "fake_loss", "d_accuracy")}
        self.progress.set_postfix(shown, refresh=False)
        self.progress.update(loop - self.progress.n)

    def close(self):
        self.progress.close()
        if self.on:
            self.board.close()


def average(values, ranks):
    """Mean over ranks of a dict of scalars (the same keys on every rank)."""
    stacked = torch.stack([torch.as_tensor(v, dtype=torch.float32).cpu() for v in values.values()])
    if ranks > 1:
        stacked = stacked.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(stacked)
        stacked /= ranks
    return dict(zip(values, stacked.tolist()))


# ------------------------------------------------------------------------------------------- set-up


def start_process():
    """-> rank, ranks, device. A process group exists whenever there is more than one rank or a GPU."""
    ranks, cuda = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if (ranks > 1 or cuda) and not dist.is_initialized():
        for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29531", "RANK": "0", "WORLD_SIZE": "1"}.items():
            os.environ.setdefault(name, value)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return int(os.environ.get("RANK", 0)), ranks, device


def open_run(config, rank):
    """The run folder, made or re-opened, with config.json in it. Refuses to touch a run that it was not told to."""
    name = [config.out or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}"]
    if dist.is_initialized():
        dist.broadcast_object_list(name)
    run = Path(name[0])
    saved = run / "config.json"
    if config.resume:
        if not config.out:
            raise UserError("--resume needs --out, the run folder to go on with")
        if not saved.exists():
            raise UserError(f"nothing to resume in {run}: it has no config.json")
        before = json.loads(saved.read_text())
        for key in ("model", "student_steps", "resolution", "seed", "batch_size"):
            if before[key] != getattr(config, key):
                flag = f"--{key.replace('_', '-')}"
                raise UserError(f"{run} was trained with {flag} {before[key]}, not {getattr(config, key)}: resume it with its own")
        if bool(before["gan_weight"]) != bool(config.gan_weight):
            raise UserError(f"{run} was trained with --gan-weight {before['gan_weight']}: Pixel-GAN cannot be switched on or off by --resume")
    elif run.exists() and any(run.iterdir()) and not config.overwrite:
        raise UserError(f"{run} is not empty: pass --resume to go on, or --overwrite to replace it")
    if rank == 0:
        if config.overwrite and not config.resume:
            shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True, exist_ok=True)
        saved.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    checkpoint.barrier()
    return run


def main():
    config = parse()
    try:
        run = train(config)
    except UserError as e:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\nerror: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"student in {checkpoint.newest(run)}; sample it with: python sample.py --run {run}")


if __name__ == "__main__":
    main()
