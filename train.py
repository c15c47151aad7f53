"""Flash-DMD training: Algorithm 1 of the paper.

    python train.py --stage 1                         one process; on the toy world by default
    torchrun --nproc-per-node 8 train.py --stage 1    FSDP2 over 8 ranks
    python train.py --stage 2                         goes on from the newest stage-1 run, with preference optimisation
    python train.py --preset sdxl-4step --dry-run     memory, FLOPs and GPU-hours, without weights or GPU (dry_run.py)
    python train.py --stage reward --pairs FOLDER     a latent reward model for stage 2 (train_reward.py)

The mathematics lives in dmd.py, score_estimator.py, pixel_gan.py, latent_reward.py, diffusion.py and, for the baseline DMD2 and the
siblings DMDR and AdvDMD, latent_gan.py, dmdr.py and advdmd.py; this file says in which order it happens.
"""

import dataclasses
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

import advdmd
import checkpoint
import data
import dmd
import dmdr
import dry_run
import latent_cache
import latent_gan
import latent_reward
import monitor
import pixel_gan
import run_folder
import score_estimator
from cast import assemble
from config import parse
from diffusion import backward_simulation, guided, rand, randn, renoise, sample_generators, times
from distributed import Ending, average_gradients, leave, start_process
from models import UserError
from train_reward import train_reward

GIVE_UP_AFTER = 10  # loops in a row with a non-finite loss or gradient


def train(config):
    """Run a stage as `config` says. Returns the run folder. Raises UserError for what a user can mend."""
    rank, ranks, device = start_process()
    if config.batch_size % ranks:
        raise UserError(f"--batch-size {config.batch_size} is not divisible by {ranks} ranks")
    if config.micro_batch and config.batch_size // ranks % config.micro_batch:
        raise UserError(f"--micro-batch {config.micro_batch} does not divide the {config.batch_size // ranks} samples of a rank")
    if config.gan == "online" and (config.micro_batch or config.batch_size // ranks) % config.candidates:
        raise UserError(f"--gan online needs whole groups: --candidates {config.candidates} must divide what a rank takes at once")
    if config.stage == 2:
        config = run_folder.from_stage_1(config)
    if config.cache_latents:
        latent_cache.check(config)
    source = data.source(config.data, config.resolution, config.seed, config.prompts)
    cast = assemble(config, ranks, device)
    G, players, share = cast.G, cast.players, len(cast.latent)
    held_out = monitor.HeldOut(cast, source) if config.preview_every and cast.R and config.reward != "clip" else None

    run = run_folder.open_run(config, rank)
    progress = dict.fromkeys(("loops", "generator_updates", "rl_updates", "samples", "passes", "skipped_updates"), 0) | {"seconds": 0.0}
    if config.resume and run_folder.newest(run):
        progress = checkpoint.restore(run, players)
    if rank == 0:
        run_folder.write_config(run, config)
    log = monitor.Log(run, rank, config, progress)
    preview = monitor.Preview(cast, source) if config.preview_every else None

    if config.cache_latents:
        latent_cache.fill(source, cast.vae, config, rank, ranks)
    firsts = range(progress["loops"] * config.batch_size + rank * share, config.iterations * config.batch_size, config.batch_size)
    ending = Ending(device)  # before loader processes fork, which are born with its handler
    batches = data.batches(source, [range(first, first + share) for first in firsts], config.workers)
    background = device.type == "cuda" and config.optimizer == "adamw"  # torchao's moments cannot be copied aside
    bad_loops, due, began = 0, set(), time.time() - progress["seconds"]

    for loop in range(progress["loops"] + 1, config.iterations + 1):  # line 4
        draw = lambda purpose: sample_generators(config.seed, loop, index.tolist(), purpose)  # noqa: B023, E731
        x_real, prompts, sizes, index = next(batches)  # line 7
        if config.gan == "online":  # AdvDMD compares rollouts of one prompt
            x_real, prompts, sizes = (advdmd.spread(v, config.candidates) for v in (x_real, prompts, sizes))
        x_real, c = x_real.to(device), cast.encoder.encode(prompts, sizes if config.size_condition == "original" else None)
        # NOTE: Algorithm 1 runs lines 5-26 and 27-31 in every iteration of stage 2; Table 4's ratios say r of the latter per one of the former.
        kind = "rl_updates" if config.stage == 2 and (config.rl_only or loop % (config.rl_ratio + 1)) else "generator_updates"
        if loop % config.log_every == 0:  # of either kind the next one
            due = {"rl_updates", "generator_updates"}
        passes_before, watched = cast.passes(), kind in due or loop == config.iterations
        cast.pace(pace(config, loop))
        if kind == "rl_updates":
            logged, moved, ok = prefer(cast, prompts, c, draw)
        else:
            logged, moved, ok = distil(cast, loop, x_real, prompts, c, draw, watched)

        progress |= {
            "loops": loop,
            kind: progress[kind] + moved,
            "samples": progress["samples"] + config.batch_size,
            "passes": progress["passes"] + (cast.passes() - passes_before) * ranks,
            "skipped_updates": progress["skipped_updates"] + (not ok),
            "seconds": time.time() - began,
            "ranks": ranks,
        }
        if watched:
            due = due - {kind}
            log.write(progress, monitor.average(logged, ranks))
        log.bar(loop, logged)
        if preview and (loop % config.preview_every == 0 or loop == config.iterations):
            log.write(progress, preview.draw(run / f"preview-{loop:06d}.png", G, rank) | (held_out.look(G) if held_out else {}))
            log.warn(held_out and held_out.warning())
        bad_loops = 0 if ok else bad_loops + 1
        ends = ending.asked() or loop == config.iterations
        last = ends or bad_loops == GIVE_UP_AFTER
        if loop % config.save_every == 0 or last:
            checkpoint.save(run, players, progress, config.keep, background=background and not last)
        if bad_loops == GIVE_UP_AFTER:
            raise UserError(f"{GIVE_UP_AFTER} loops in a row with a non-finite loss or gradient; saved in {run} (lower the learning rates)")
        if ends:
            break
    log.close()
    return run


# --------------------------------------------------------------------------- Algorithm 1, one iteration


def distil(cast, loop, x_real, prompts, c, draw, watched):
    """Lines 5-26: one loop of distribution matching and Pixel-GAN. x_real (B, 3, H, W) or its latents, its prompts, c their condition; draw(purpose):
    a generator per sample. -> what to log, with the health signals where `watched`; whether G moved; whether every update was finite."""
    config, D = cast.config, cast.D
    noise, size = {purpose: draw(purpose) for purpose in ("rollout", "renoise", "fake", "unseen")}, config.micro_batch or len(x_real)
    nth = loop // (config.rl_ratio + 1) if config.stage == 2 else loop  # of the loops that come here
    k = (nth - 1) // config.ttur  # generator updates so far
    common = {"share": size / len(x_real), "look_at": window(config, cast.vae, cast.latent.shape[-1], loop), "k": k}
    parts = [slice(n, n + size) for n in range(0, len(x_real), size)]  # gradients add up over micro-batches
    parts = [Part(x_real[n], prompts[n], {key: v[n] for key, v in c.items()}, **{key: v[n] for key, v in noise.items()}, **common) for n in parts]
    ok, moved = True, False

    # The timestep-aware part: x, for the DM loss, starts from any student step but the last (3.3).
    i = int(np.random.default_rng([config.seed, loop]).integers(len(cast.S) - (config.dm_steps == "high")))
    updates_G = nth % config.ttur == 0  # line 12. ASSUMPTION: an iteration is a loop, so G moves in every TTUR-th
    logged = monitor.mean([generator_turn(cast, part, i, updates_G) for part in parts])  # lines 5-16
    if updates_G and config.gan == "online" and cast.head is not None and k >= config.rl_after:
        logged |= monitor.mean([advdmd.reinforce(cast, part) for part in parts])
    if updates_G:  # lines 17-18
        logged["g_norm"], moved = cast.update("G", sum(logged.values()), config.clip_grad)  # losses, and what would show a NaN as well
        if moved:
            score_estimator.pull(cast.weights("fake"), cast.weights("G"), config.ema)  # Eq. 11
        ok &= moved

    logged |= (fake_loss := monitor.mean([estimator_turn(cast, part) for part in parts]))  # lines 21-23
    logged["fake_norm"], stepped = cast.update("fake", fake_loss["fake_loss"], config.clip_grad)  # line 24
    ok &= stepped
    if cast.head is not None:
        average_gradients(cast.head, cast.ranks)
        ok &= cast.update("head", logged["d_loss"])[1]

    if D is not None:  # lines 25-26
        logged |= monitor.mean([discriminator_turn(cast, part) for part in parts])
        average_gradients(D, cast.ranks)
        _, stepped = cast.update("D", logged["d_loss"])
        ok &= stepped

    if watched:
        logged |= monitor.mean([look(cast, part, i, logged["fake_loss"]) for part in parts])
    return logged, moved, ok


def pace(config, loop):
    """What the learning rates of G, by preference too, and of the score estimator are multiplied by in this loop."""
    left = 1 - (loop - 1) / config.iterations if config.lr_schedule == "linear" else 1.0
    with_reward = config.reward_weight and (loop - 1) // config.ttur >= config.dynamic  # DMDR: reward joins after the cold start, at half the rates
    return left / 2 if with_reward else left


@dataclasses.dataclass
class Part:
    """A micro-batch, and what its turns leave for the next ones."""

    x_real: torch.Tensor  # pictures, or with --cache-latents their latents
    prompts: list
    c: dict
    rollout: list  # generators, one per sample and purpose
    renoise: list
    fake: list
    unseen: list
    share: float  # of the rank's batch
    look_at: tuple  # where D looks: indices into latents and into pixels
    k: int  # generator updates so far
    x: torch.Tensor = None  # detached, as all of these
    x_adv: torch.Tensor = None
    states: list = None  # AdvDMD: the rollout, from noise to x_0
    features: list = None  # D's, of V(x_adv), where it looks
    t: torch.Tensor = None  # where Eq. 6 was taken
    eps: torch.Tensor = None


def window(config, vae, side, loop):
    """Where D looks in this loop: a square of --gan-crop pixels, or everything. -> index into latents (side x side), and into their pixels."""
    size = config.gan_crop // vae.factor or side
    corner = np.random.default_rng([config.seed, loop, 1]).integers(side - size + 1, size=2)
    at = lambda f: (..., *(slice(int(a) * f, (int(a) + size) * f) for a in corner))  # noqa: E731
    return at(1), at(vae.factor)


def generator_turn(cast, part, i, updates_G):
    """Lines 5-16: x = G(x_τi), x_adv at the last step, and where G moves the gradients of L_dmd + λ L_adv. -> the losses."""
    config, G, D, S, c = cast.config, cast.G, cast.D, cast.S, part.c
    schedule, last, rollout, logged = G.schedule, len(S) - 1, part.rollout, {}
    z = randn(rollout, cast.latent[: len(part.x_real)])
    if config.gan == "online":  # AdvDMD: one simulation for distribution matching and reinforcement
        part.states = advdmd.simulate(G, z, c, S, rollout)
    x_tau = part.states[i] if part.states else backward_simulation(G, z, c, S, rollout, 0, i)
    with torch.set_grad_enabled(updates_G):
        x = G(x_tau, times(S[i], x_tau), c)
    if updates_G:  # lines 13-14, Eq. 4. NOTE: line 14 writes the scores' difference as a loss; its gradient is meant, as in Eq. 4
        # ASSUMPTION: line 13's T_noisy is 0.02 to 0.98 of the range, as in DMD; 3.1 says U(0, T).
        low, high = config.renoise
        t = schedule.t_at(low + (high - low) * renoise_share(config, part.k, part.renoise, x.device))
        eps, teacher = randn(part.renoise, x), cast.guided_teacher
        if part.k < config.dynamic:  # DMDR's DynaDG
            teacher = guided(dmdr.real_score(cast.fake, config.real_scale * dmdr.c_at(part.k, config.dynamic)), cast.null, config.guidance)
        L = L_dmd = dmd.loss(x, dmd.gradient(teacher, cast.fake, x, t, eps, c))
        logged["dm_loss"] = L_dmd.detach()
        if config.reward_weight and part.k >= config.dynamic:  # DMDR's reward, through this one step
            L_reward, scores = dmdr.reward_loss(dmdr.judge(cast, part, i, eps), x, config.reward_margin)
            L = L + config.reward_weight * L_reward
            logged["reward"] = scores.mean()
        if cast.head is not None and config.gan == "latent":  # DMD2, Eq. 5: beside the DM loss, at whichever step it is
            L_adv = latent_gan.generator_loss(cast.fake, cast.head, x, t, eps, c)
            L = L + config.gan_weight * L_adv
            logged["adv_loss"] = L_adv.detach()
        (part.share * L).backward()
        for name in ("fake", "head") if cast.head is not None else ():
            cast.forget(name)  # Eq. 5 is G's alone
    part.x = x = x.detach()  # line 20, before the rest of the rollout re-uses it

    # Lines 9, 11: x_adv at the last step, whose input is a detached rollout (Eq. 8). NOTE: Eq. 9 re-noises the finished x_0 first (reading a).
    if D is not None:
        x_last = x_tau if i == last else backward_simulation(G, renoise(schedule, x, S, i + 1, rollout), c, S, rollout, i + 1, last)
        if config.adv_reading == "a":  # Eq. 9: finish the rollout, re-noise x_0, denoise again
            x_0 = backward_simulation(G, x_last, c, S, rollout, last)
            x_last = renoise(schedule, x_0, S, last, rollout)
        with torch.set_grad_enabled(updates_G):
            x_adv = G(x_last, times(S[last], x_last), c)
            features = D.features(cast.vae.decode(x_adv[part.look_at[0]]))
        if updates_G:  # lines 15-16, Eq. 9
            D.requires_grad_(False)
            L_adv = pixel_gan.generator_loss(D(features), config.gan_loss)
            (part.share * config.gan_weight * L_adv).backward()
            D.requires_grad_(True)
            logged["adv_loss"] = L_adv.detach()
        part.x_adv, part.features = x_adv.detach(), [f.detach() for f in features]
    return logged


def renoise_share(config, k, generators, device):
    """u, which t follows from: uniform, or in a dynamic phase DMDR's DynaRS. (B,)"""
    return dmdr.renoise_share(generators, dmdr.c_at(k, config.dynamic), device) if k < config.dynamic else rand(generators, device)


def estimator_turn(cast, part):
    """Lines 21-23, Eq. 6: the score estimator follows x; in DMD2 it is the discriminator too, Eq. 7. -> its losses."""
    part.t = cast.G.schedule.t_at(renoise_share(cast.config, part.k, part.fake, part.x.device))
    part.eps = randn(part.fake, part.x)
    L = L_fake = score_estimator.loss(cast.fake, part.x, part.t, part.eps, part.c)
    logged = {"fake_loss": L_fake.detach()}
    if cast.head is not None:
        real = cast.latents(part.x_real)
        if part.states:  # AdvDMD
            judged = advdmd.judged(cast.fake, cast.head, part.states, real, cast.S, part.eps, part.c)
            L_D, right = advdmd.discriminator_loss(*judged), advdmd.accuracy(*judged)
        else:  # DMD2
            L_D, right = latent_gan.discriminator_loss(cast.fake, cast.head, part.x, real, part.t, part.eps, part.c)
        L = L_fake + cast.config.critic_weight * L_D
        logged |= {"d_loss": L_D.detach(), "d_accuracy": right}
    (part.share * L).backward()
    return logged


def discriminator_turn(cast, part):
    """Line 25, Eq. 10: D judges the pictures that G was judged by. -> its loss and accuracy."""
    latents, pixels = part.look_at
    reals = cast.vae.decode(cast.latents(part.x_real)[latents]) if cast.config.gan_reals == "vae" else part.x_real[pixels]
    real_logits, fake_logits = cast.D(cast.D.features(reals)), cast.D(part.features)
    L_D = pixel_gan.discriminator_loss(real_logits, fake_logits, cast.config.gan_loss)
    (part.share * L_D).backward()
    return {"d_loss": L_D.detach(), "d_accuracy": pixel_gan.accuracy(real_logits, fake_logits)}


def look(cast, part, i, L_fake):
    """The health signals of a micro-batch."""
    if part.x_adv is None:  # no Pixel-GAN has finished the rollout
        x_next = renoise(cast.G.schedule, part.x, cast.S, i + 1, part.rollout)
        part.x_adv = backward_simulation(cast.G, x_next, part.c, cast.S, part.rollout, i + 1)
    return monitor.health(cast.pictures(part.x_real), cast.latents(part.x_real), part.x_adv, cast.vae, cast.teacher, L_fake, part.t, part.eps, part.c)


def prefer(cast, prompts, c, draw):
    """Lines 28-31: one update of G by preference (Eq. 12-13). -> what to log, whether G moved, whether it was finite."""
    config, G, S = cast.config, cast.G, cast.S
    noise, c_R, n, size = draw("rl"), cast.R.encoder.encode(prompts), len(prompts), config.micro_batch or len(prompts)
    judged = 2 if config.rl_steps == "high" else len(S) - 1  # the last transition, to 0, has no density
    how, pool = (S, judged, config.candidates, config.carry), []
    for part in [slice(first, first + size) for first in range(0, n, size)]:  # gradients add up over micro-batches
        c_part, c_R_part = ({key: v[part] for key, v in cs.items()} for cs in (c, c_R))
        steps = latent_reward.rollout(G, cast.R, randn(noise[part], cast.latent[part]), c_part, c_R_part, *how, noise[part])  # line 28
        pool += [(c_part, *step) for step in steps]
    chosen = [latent_reward.choose(scores, config.pair_threshold) for *_, scores in pool]  # line 29

    kept_pairs = torch.stack([kept for *_, kept in chosen]).sum().float()
    if dist.is_initialized():
        dist.all_reduce(kept_pairs)
    total, right, drift = 0.0, 0.0, 0.0
    for (c_part, i, z_t, z_s, _), (win, lose, kept) in zip(pool, chosen, strict=True):  # line 30, Eq. 12-13
        s, rows = times(S[i + 1], z_t), torch.arange(len(z_t), device=z_t.device)
        x0_theta = G(z_t, times(S[i], z_t), c_part)
        with torch.no_grad():
            x0_ref = cast.ref(z_t, times(S[i], z_t), c_part)
        alpha_s, sigma_s = G.schedule.alpha(s), G.schedule.sigma(s)
        H = latent_reward.advantage(z_s[rows, win], z_s[rows, lose], x0_theta, x0_ref, alpha_s, sigma_s, config.ratio_clip)
        L = (latent_reward.loss(H, config.beta) * kept).sum() * cast.ranks / kept_pairs.clamp(min=1)  # FSDP averages over ranks
        L.backward()  # a rank without a pair takes part with weight zero
        total, right = total + L.detach(), right + ((H > 0) & kept).sum()
        drift = drift + (alpha_s * (x0_theta - x0_ref) / sigma_s).detach().square().mean() / 2
    norm, ok = cast.update("G, RL", total, config.clip_grad)  # line 31; without one pair the gradient is 0
    score_estimator.pull(cast.weights("fake"), cast.weights("G"), config.ema if ok else 1)  # Eq. 11, as after line 17
    scores = torch.cat([scores for *_, scores in pool])
    logged = {
        "rl_loss": total,
        "reward": scores.mean(),
        "reward_gap": (scores.amax(1) - scores.amin(1)).mean(),
        "kept_pairs": kept_pairs / (cast.ranks * judged * n),
        "implicit_accuracy": right * cast.ranks / kept_pairs.clamp(min=1),
        "kl_to_reference": drift / len(pool),
        "rl_norm": norm,
    }
    return logged, ok, ok


def main():
    config = parse()
    try:
        if config.dry_run:
            return dry_run.report(config, distil, prefer)
        run = train_reward(config) if config.stage == "reward" else train(config)
    except UserError as e:
        print(f"\nerror: {str(e).split('UserError: ')[-1].strip()}", file=sys.stderr)  # a loader process sends its traceback along
        return leave(2)
    except RuntimeError as e:
        if not (line := monitor.out_of_memory(e, config)):
            raise
        print(f"\nerror: {line}", file=sys.stderr)
        return leave(2)
    if int(os.environ.get("RANK", 0)) == 0:
        made = run_folder.newest(run)
        reward = f"reward model in {made}/lrm; use it with: python train.py --stage 2 --reward {made}/lrm"
        print(reward if config.stage == "reward" else f"student in {made}; sample it with: python sample.py --run {run}")
    leave()


if __name__ == "__main__":
    main()
