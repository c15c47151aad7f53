"""Flash-DMD training: Algorithm 1 of the paper.

    python train.py --stage 1                         one process; on the toy world by default
    torchrun --nproc-per-node 8 train.py --stage 1    FSDP2 over 8 ranks
    python train.py --stage 2                         goes on from the newest stage-1 run, with preference optimisation
    python train.py --preset sdxl-4step --dry-run     memory, FLOPs and GPU-hours, without weights or GPU
    python train.py --method dmd2                     the baseline; dmdr, advdmd: the sibling papers (siblings/)
    python train.py --stage reward --pairs FOLDER     a latent reward model for stage 2

The mathematics is in dmd.py, score_estimator.py, pixel_gan.py, latent_reward.py and diffusion.py. This file says in
which order it happens. Numbers behind # are lines of Algorithm 1. What the paper leaves out is in engine/: data, ranks,
logs, checkpoints.
"""

import os
import sys

from engine.errors import UserError
from engine.flags import method_of, parse, start
from engine.run_folder import look, what_next
from siblings import settings_of, sibling


def read(argv=None):
    """Command line -> the settings of Flash-DMD, or of the sibling that --method names. Raises UserError."""
    return parse(argv, settings_of(method_of(argv)))


if __name__ == "__main__":
    start(lambda: look(read()))  # mistakes in flags and folders are answered here, before torch is loaded

import torch

import dmd
import latent_reward
import pixel_gan
import score_estimator
from diffusion import backward_simulation, randn, times
from engine import data, dry_run, latent_cache, monitor
from engine.batch import micro_batches
from engine.distributed import leave, start_process, total
from engine.loop import Run
from engine.networks import assemble
from engine.reward_training import train_reward


def train(config):
    """Run stage 1 or 2 as `config` says -> the run folder. Raises UserError for what a user can mend."""
    config = look(config)
    if config.cache_latents:
        latent_cache.check(config)
    rank, ranks, device = start_process()
    prepare_method, iterate = method(config)
    source = data.source(config.data, config.resolution, config.seed, config.prompts)
    nets = assemble(config, ranks, device, prepare_method, source)  # 1-3
    run = Run(config, nets, source, rank)
    for batch in run.batches():  # 4, 7
        # NOTE: Algorithm 1 does lines 5-26 and 27-31 in every iteration of stage 2. Table 4 has ratios r:1: here r
        # preference updates and one distillation loop alternate.
        period = config.rl_ratio + 1 if config.stage == 2 else 1
        distils = not config.rl_only and batch.loop % period == 0
        kind = "generator_updates" if distils else "rl_updates"
        batch.watched = run.watches(kind, batch.loop)  # whether its health signals are due
        nets.pace(batch.loop)  # learning rates
        if distils:
            logged = iterate(nets, batch, batch.loop // period)  # 5-26
        else:
            logged = prefer(nets, batch)  # 27-31
        if run.ends(batch, kind, logged):
            break
    return run.folder


def method(config):
    """-> prepare, which adds the method's networks, and iterate, its lines 5-26."""
    if config.method == "flash":
        return prepare, flash
    return sibling(config.method).prepare, sibling(config.method).iterate


def prepare(nets):
    """Line 3: D, Pixel-GAN's discriminator."""
    config = nets.config
    if config.gan_weight:
        torch.manual_seed(config.seed)
        D = pixel_gan.PixelDiscriminator(nets.sam(), checkpointing=config.checkpointing)
        nets.D = nets.add("D", D, config.d_lr)


# --------------------------------------------------------------------------- Algorithm 1, one iteration


def flash(nets, batch, n):
    """Lines 5-26: the n-th loop of distribution matching and Pixel-GAN -> what to log, {name: value}.

    Nothing is sampled twice: the DM loss (Eq. 4) and the score estimator (Eq. 6) use the same x, G's adversarial loss
    (Eq. 9) and D (Eq. 10) the same x_adv. Each loss runs backward at once, so that one graph of G lives at a time:
    hence the order 13, 14, 20, 9, 11, 15, 16. Gradients of micro-batches add up, weighted by their part of the batch.
    """
    config, G, fake, D, S = nets.config, nets.G, nets.fake, nets.D, nets.S
    parts = micro_batches(batch, config.micro_batch)
    logged = monitor.Means()
    moves_G = n % config.ttur == 0  # 12. ASSUMPTION: iterations are loops; fake and D move in each
    i = dmd.student_step(S, config.dm_steps, config.seed, batch.loop)  # 6
    seen, seen_pixels = pixel_gan.window(config.gan_crop, nets.latent, nets.vae.factor, config.seed, batch.loop)
    loss_G = 0.0
    made = []  # of each micro-batch: x, x_adv, D's features of V(x_adv), and its rollout's random generators

    for b in parts:
        rng = b.generators("rollout")  # one random generator per sample; a second call of this begins anew
        z = randn(rng, nets.like(b))  # 5
        x_tau = backward_simulation(G, z, b.c, S, rng, 0, i)  # 8
        with torch.set_grad_enabled(moves_G):
            x = G(x_tau, times(S[i], x_tau), b.c)  # 10
        if moves_G:
            # NOTE: line 14 writes the scores' difference as a loss; its gradient is meant, as in Eq. 4. Lines 14 and 15
            # print "Eq. 9" and "Eq. 10" for 4 and 9.
            rng_t = b.generators("renoise")
            t = dmd.renoise_time(G.schedule, config.renoise, rng_t, x.device)  # 13
            eps = randn(rng_t, x)
            L_dmd = dmd.loss(x, dmd.gradient(nets.guided_teacher, fake, x, t, eps, b.c))  # 14, Eq. 4
            (b.weight * L_dmd).backward()
            loss_G += b.weight * L_dmd.detach()
            logged.add(b.weight, dm_loss=L_dmd)
        x = x.detach()  # 20
        x_adv = features = None
        if D is not None:
            x_last = pixel_gan.last_input(G, x_tau, x, b.c, S, i, rng, config.adv_reading)  # 9, Eq. 8
            with torch.set_grad_enabled(moves_G):
                x_adv = G(x_last, times(S[-1], x_last), b.c)  # 9: G at the last student step
                features = D.features(nets.vae.decode(x_adv[seen]))  # 11
            if moves_G:
                D.requires_grad_(False)
                L_adv = pixel_gan.generator_loss(D(features), config.gan_loss)  # 15, Eq. 9
                (b.weight * config.gan_weight * L_adv).backward()  # 16: L = L_dmd + λ L_adv
                D.requires_grad_(True)
                loss_G += b.weight * config.gan_weight * L_adv.detach()
                logged.add(b.weight, adv_loss=L_adv)
            x_adv = x_adv.detach()
            features = [f.detach() for f in features]
        made.append((x, x_adv, features, rng))

    if moves_G:
        logged["g_norm"], moved = nets.step("G", loss_G, config.clip_grad)  # 17
        if moved:  # not where the loss or a gradient is not finite
            score_estimator.pull(nets.weights("fake"), nets.weights("G"), config.ema)  # 18, Eq. 11

    for b, (x, *_) in zip(parts, made):
        t, eps = score_estimator.draw(G.schedule, b.generators("fake"), x)  # 21
        L_fake = score_estimator.loss(fake, x, t, eps, b.c)  # 22-23, Eq. 6
        (b.weight * L_fake).backward()
        logged.add(b.weight, fake_loss=L_fake)
    logged["fake_norm"], _ = nets.step("fake", logged["fake_loss"], config.clip_grad)  # 24

    if D is not None:
        for b, (_, _, fake_features, _) in zip(parts, made):  # 25
            real = b.x_real[seen_pixels] if config.gan_reals == "raw" else nets.vae.decode(nets.latents(b.x_real)[seen])
            real_logits = D(D.features(real))
            fake_logits = D(fake_features)
            L_D = pixel_gan.discriminator_loss(real_logits, fake_logits, config.gan_loss)  # Eq. 10
            (b.weight * L_D).backward()
            logged.add(b.weight, d_loss=L_D, d_accuracy=pixel_gan.accuracy(real_logits, fake_logits))
        nets.step("D", logged["d_loss"])  # 26

    if batch.watched:
        for b, (x, x_adv, _, rng) in zip(parts, made):
            t, eps = score_estimator.draw(G.schedule, b.generators("fake"), x)  # those of Eq. 6
            x_0 = monitor.finish(G, x, i, b.c, S, rng) if D is None else x_adv
            logged.add(b.weight, **monitor.health(nets, b, x_0, logged["fake_loss"], t, eps))
    return logged


def prefer(nets, batch):
    """Lines 27-31: one update of G by preference (Eq. 12, 13) -> what to log, {name: value}.

    G moves by an optimizer of its own ("G, RL"); the score estimator follows by Eq. 11 alone, D stands still.
    """
    config, G, R, S = nets.config, nets.G, nets.R, nets.S
    transitions, thresholds = config.judged(), config.thresholds()
    pairs, every_score = [], []
    for b in micro_batches(batch, config.micro_batch):
        rng = b.generators("rl")
        z = randn(rng, nets.like(b))
        c_R = R.encoder.encode(b.prompts)
        steps = latent_reward.rollout(G, R, z, b.c, c_R, S, transitions, config.candidates, config.carry, rng)  # 28
        for i, z_t, z_s, scores in steps:
            win, lose, kept = latent_reward.choose(scores, thresholds[min(i, len(thresholds) - 1)])  # 29
            rows = torch.arange(len(z_t), device=z_t.device)
            pairs.append((b.c, i, z_t, z_s[rows, win], z_s[rows, lose], kept))
            every_score.append(scores)

    n_kept = total(torch.stack([kept for *_, kept in pairs]).sum().float())  # over all ranks
    loss = agreed = divergence = 0.0
    for c, i, z_t, z_win, z_lose, kept in pairs:  # 30
        t, s = S[i], S[i + 1]
        H, kl = latent_reward.pair_terms(G, nets.ref, z_t, z_win, z_lose, t, s, c, config.ratio_clip)  # Eq. 13
        L = (latent_reward.loss(H, config.beta) * kept).sum()  # Eq. 12
        L = L * nets.ranks / n_kept.clamp(min=1)  # the mean over all ranks' pairs: FSDP2 averages over ranks
        L.backward()  # a rank without a pair takes part with weight zero
        loss = loss + L.detach()
        agreed = agreed + (latent_reward.agrees(H) & kept).sum()
        divergence = divergence + kl / len(pairs)
    norm, moved = nets.step("G, RL", loss, config.clip_grad)  # 31
    if moved:
        score_estimator.pull(nets.weights("fake"), nets.weights("G"), config.ema)  # Eq. 11, as after line 17
    scores = torch.cat(every_score)
    return {
        "rl_loss": loss,
        "reward": scores.mean(),
        "reward_gap": (scores.amax(1) - scores.amin(1)).mean(),
        "kept_pairs": n_kept / (nets.ranks * transitions * len(batch.samples)),
        "implicit_accuracy": agreed * nets.ranks / n_kept.clamp(min=1),
        "kl_to_reference": divergence,
        "rl_norm": norm,
    }


def main(argv=None):
    config = None
    try:
        config = look(read(argv))
        if config.dry_run:
            return dry_run.report(config, *method(config), prefer)
        run = train_reward(config) if config.stage == "reward" else train(config)
    except (UserError, RuntimeError, OSError) as e:
        line = monitor.error_line(e, config)
        if line is None:
            raise
        print(f"\nerror: {line}", file=sys.stderr)
        return leave(2)
    if int(os.environ.get("RANK", 0)) == 0:
        print(what_next(run, config.stage))
    leave()


if __name__ == "__main__":
    main()
