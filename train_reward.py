"""A latent reward model from preference pairs (LPO, arXiv 2502.01051): python train.py --stage reward --pairs FOLDER.

    -E [ log σ( R(z^w_t, t, c) - R(z^l_t, t, c) ) ],  t uniform in 1 .. 951, one t for both latents of a pair

R starts as the model's own UNet and text encoders. NOTE: LPO trains the text encoders too; here they stay as they are.
Every rank holds R whole and gradients are averaged over ranks.
"""

import dataclasses
import json

import torch

import checkpoint
import data
import monitor
from diffusion import rand, randn, sample_generators, times
from distributed import average_gradients, start_process, update
from latent_reward import LatentRewardModel, bradley_terry, pair_scores
from models import UserError, load_schedule, load_vae

LEVELS = (50, 250, 500, 749)  # noise levels at which held-out pairs are judged


def train_reward(config):
    """Train R as `config` says. Returns the run folder, whose checkpoints hold lrm/. Raises UserError for what a user can mend."""
    rank, ranks, device = start_process()
    if not config.pairs:
        raise UserError("--stage reward needs --pairs, a folder of picture pairs")
    share, rest = divmod(config.batch_size, ranks)
    if rest:
        raise UserError(f"--batch-size {config.batch_size} is not divisible by {ranks} ranks")
    source = data.Pairs(config.pairs, config.resolution, config.seed)
    vae, schedule = load_vae(config.model, device), load_schedule(config.model)
    torch.manual_seed(config.seed)
    R = LatentRewardModel.from_pipeline(config.model, config.resolution, device).train()
    if config.checkpointing:
        R.unet.enable_gradient_checkpointing()
    players = {"R": (R, torch.optim.AdamW(R.parameters(), lr=config.reward_lr, weight_decay=config.weight_decay))}

    run = checkpoint.open_run(config, rank)
    progress = {"loops": 0, "samples": 0, "skipped_updates": 0}
    if config.resume and checkpoint.newest(run):
        progress = checkpoint.restore(run, players)
    if rank == 0:
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    log = monitor.Log(run, rank, config, progress)
    firsts = range(progress["loops"] * config.batch_size + rank * share, config.iterations * config.batch_size, config.batch_size)
    batches = data.batches(source, [range(first, first + share) for first in firsts], config.workers)
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    for loop in range(progress["loops"] + 1, config.iterations + 1):
        pictures, prompts, index = next(batches)  # (B, 2, 3, H, W), better first
        win, lose = vae.encode(pictures.flatten(0, 1).to(device)).unflatten(0, (-1, 2)).unbind(1)
        noise = sample_generators(config.seed, loop, index.tolist(), "reward")
        t = (1 + 951 * rand(noise, device)).long()
        with half:
            better, worse = pair_scores(R, schedule, win, lose, t, randn(noise, win), randn(noise, win), R.encoder.encode(prompts))
            L = bradley_terry(better, worse)
        L.backward()
        average_gradients(R, ranks)
        norm, ok = update(players["R"][1], L, config.clip_grad)
        progress |= {"loops": loop, "samples": loop * config.batch_size, "skipped_updates": progress["skipped_updates"] + (not ok)}
        last = loop == config.iterations
        if loop % config.log_every == 0 or last:
            logged = {"reward_loss": L.detach(), "right": (better > worse).float().mean(), "norm": norm}
            log.write(progress, monitor.average(logged, ranks))
            log.bar(loop, logged)
        if last or (config.preview_every and loop % config.preview_every == 0):
            with half:
                log.write(progress, held_out(R, schedule, vae, source))
        if loop % config.save_every == 0 or last:
            checkpoint.save(run, players, progress, config.keep, lambda folder, R, _: R.save_pretrained(folder / "lrm", config.model))
    log.close()
    return run


@torch.no_grad()
def held_out(R, schedule, vae, source, batch=16):
    """The share of held-out pairs that R ranks right, per noise level."""
    right, device = {t: [] for t in LEVELS}, next(R.parameters()).device
    for i in range(0, len(source.kept_out), batch):
        rows = source.kept_out[i : i + batch]
        pictures = torch.stack([source.pictures(row) for row in rows])
        win, lose = vae.encode(pictures.flatten(0, 1).to(device)).unflatten(0, (-1, 2)).unbind(1)
        c, noise = R.encoder.encode([row["caption"] for row in rows]), sample_generators(0, 0, range(i, i + len(rows)), "held out")
        for t in LEVELS:
            better, worse = pair_scores(R, schedule, win, lose, times(torch.tensor(t), win), randn(noise, win), randn(noise, win), c)
            right[t] += (better > worse).tolist()
    return {f"held_out_right_at_{t}": sum(v) / len(v) for t, v in right.items()}
