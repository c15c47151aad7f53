"""A latent reward model from preference pairs (LPO, arXiv 2502.01051): python train.py --stage reward --pairs FOLDER.

    -E [ log σ( R(z^w_t, t, c) - R(z^l_t, t, c) ) ],  t uniform in 1 .. 951, one t for both latents of a pair

R starts from the model's UNet and text encoders, or as a LoRA on SD3's first blocks (engine/dina_lrm.py). NOTE: LPO
trains the text encoders too; here they are frozen.

Every rank holds all of R; gradients are averaged over ranks.
"""

from itertools import islice
from pathlib import Path

import torch

from diffusion import rand, randn, sample_generators, times
from engine import checkpoint, data, layouts, monitor, run_folder, text
from engine.decode import Unreadable, Unusable, read
from engine.distributed import Ending, adamw, average_gradients, from_rank_0, start_process, update
from engine.errors import UserError
from engine.models import load_schedule, load_vae
from engine.reward_model import backbone, save_reward_model, untrained_reward_model
from latent_reward import bradley_terry, pair_scores

LEVELS = (50, 250, 500, 749)  # noise levels at which held-out pairs are scored


class Pairs:
    """Preference pairs for a latent reward model: a folder of images and a metadata.jsonl with Pick-a-Pic's columns.

    Per line: "caption", "jpg_0_file_name", "jpg_1_file_name", and "label_0": 1 where picture 0 is preferred, 0 where
    picture 1 is, 0.5 for a tie. An item is a pair's pictures (2, 3, H, W), the better first, and its caption. Pairs are
    shuffled every epoch; ties are left out. One pair in twenty, at most 512, is `kept_out` of training. A pair with a
    picture that cannot be used is replaced by the next, by the rules of engine/data.py.
    Raises UserError for too many of those, missing columns and unknown labels.
    """

    def __init__(self, path, resolution, seed):
        self.path = Path(path)
        self.resolution = resolution
        self.seed = seed
        pairs = []
        for number, row in layouts.pairs(path):
            if row["label_0"] != 0.5:
                names = (row["jpg_0_file_name"], row["jpg_1_file_name"])
                caption = text.caption(row, f"line {number}")
                pairs.append({"caption": caption, "names": names if row["label_0"] == 1 else names[::-1]})
        self.kept_out = pairs[::20][:512]
        self.rows = [pair for i, pair in enumerate(pairs) if i % 20 or i >= 20 * 512]
        if not self.rows:
            raise UserError(f"{path} has too few pairs without a tie: {len(pairs)}, needs at least 2")
        self.bad = data.PassedOver(path, 2 * len(pairs))
        for name in dict.fromkeys(name for pair in pairs for name in pair["names"]):
            if not (self.path / name).is_file():
                self.bad.add(name, Unreadable("no such file"))

    def pictures(self, row):
        """The pair's pictures, (2, 3, H, W) in [-1, 1], the better first; None where one cannot be used."""
        out = []
        for name in row["names"]:
            if name in self.bad:
                return None
            try:
                out.append(read(self.path / name, self.resolution)[0])
            except Unusable as e:
                self.bad.add(name, e)
                return None
        return torch.stack(out)

    def __getitem__(self, i):
        epoch, rows = data.candidates(i, len(self.rows), self.seed)
        for number in rows:
            row = self.rows[number]
            pictures = self.pictures(row)
            if pictures is not None:
                return pictures, data.one_of(row["caption"], self.seed, epoch, number)
        raise self.bad.none_left()

    def held_out(self):
        """The kept-out pairs that can be used: (number, pictures, caption) of each."""
        for number, row in enumerate(self.kept_out):
            pictures = self.pictures(row)
            if pictures is not None:
                yield number, pictures, data.first_of(row["caption"])


def train_reward(config):
    """Train R as `config` says -> the run folder, whose checkpoints hold lrm/. Raises UserError."""
    config = run_folder.look(config)
    rank, ranks, device = start_process()
    per_rank = config.per_rank(ranks)
    source = Pairs(config.pairs, config.resolution, config.seed)
    vae = load_vae(config.model, device)
    schedule = load_schedule(config.model)
    torch.manual_seed(config.seed)
    R = untrained_reward_model(config.model, config.resolution, device).train()
    if config.checkpointing:
        backbone(R).enable_gradient_checkpointing()
    players = {"R": (R, adamw([p for p in R.parameters() if p.requires_grad], config.reward_lr, config))}

    run = from_rank_0(lambda: run_folder.open_run(config))
    progress = {"loops": 0, "samples": 0, "skipped_updates": 0}
    if config.resume and run_folder.newest(run):
        progress = checkpoint.restore(run, players)
    if rank == 0:
        run_folder.write_config(run, config)
    log = monitor.Log(run, rank, config, progress)
    first = progress["loops"] * config.batch_size + rank * per_rank
    starts = range(first, config.iterations * config.batch_size, config.batch_size)
    ending = Ending(device)  # before loader processes fork
    batches = data.batches(source, [range(start, start + per_rank) for start in starts], config.workers)
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    for loop in range(progress["loops"] + 1, config.iterations + 1):
        pictures, prompts, index = next(batches)  # (B, 2, 3, H, W), better first
        win, lose = vae.encode(pictures.flatten(0, 1).to(device)).unflatten(0, (-1, 2)).unbind(1)
        noise = sample_generators(config.seed, loop, index.tolist(), "reward")
        t = (1 + 951 * rand(noise, device)).long()
        eps_win, eps_lose = randn(noise, win), randn(noise, win)
        with half:
            better, worse = pair_scores(R, schedule, win, lose, t, eps_win, eps_lose, R.encoder.encode(prompts))
            L = bradley_terry(better, worse)
        L.backward()
        average_gradients(R, ranks)
        norm, ok = update(players["R"][1], L, config.clip_grad)
        progress["loops"] = loop
        progress["samples"] = loop * config.batch_size
        progress["skipped_updates"] += not ok
        last = ending.asked() or loop == config.iterations
        if loop % config.log_every == 0 or last:
            logged = {"reward_loss": L.detach(), "right": (better > worse).float().mean(), "norm": norm}
            log.write(progress, monitor.average(logged, ranks))
            log.bar(loop, logged)
        if loop % config.save_every == 0 or last:
            write = lambda folder, R, _: save_reward_model(R, folder / "lrm", config.model)  # noqa: E731
            checkpoint.save(run, players, progress, config.keep, write)
        preview = config.preview_every and loop % config.preview_every == 0 and not last
        if loop == config.iterations or preview:
            with half:
                log.write(progress, held_out(R, schedule, vae, source))
        if last:
            break
    log.close()
    ending.close()
    run_folder.close_run(run)
    return run


@torch.no_grad()
def held_out(R, schedule, vae, source, batch=16):
    """The fraction of held-out pairs that R ranks right, per noise level: {name: value} to log."""
    right = {t: [] for t in LEVELS}
    device = next(R.parameters()).device
    pairs = source.held_out()
    while rows := list(islice(pairs, batch)):
        numbers, pictures, captions = zip(*rows)
        win, lose = vae.encode(torch.stack(pictures).flatten(0, 1).to(device)).unflatten(0, (-1, 2)).unbind(1)
        c = R.encoder.encode(list(captions))
        noise = sample_generators(0, 0, numbers, "held out")
        for t in LEVELS:
            level = times(torch.tensor(t), win)
            eps_win, eps_lose = randn(noise, win), randn(noise, win)
            better, worse = pair_scores(R, schedule, win, lose, level, eps_win, eps_lose, c)
            right[t] += (better > worse).tolist()
    return {f"held_out_right_at_{t}": sum(v) / len(v) for t, v in right.items() if v}
