"""The bookkeeping of a training loop: counters, log, previews, checkpoints, its end. Algorithm 1 is in train.py."""

import time

from engine import checkpoint, data, doctor, latent_cache, monitor, run_folder
from engine.batch import Batch
from engine.distributed import Ending, from_rank_0
from engine.errors import UserError
from engine.watch import Watch

GIVE_UP_AFTER = 10  # loops in a row with a non-finite loss or gradient
KINDS = {"generator_updates": "G", "rl_updates": "G, RL"}  # the counter of a kind of loop -> the player it counts for


class Run:
    """A run folder, and the state of a training loop beside its networks."""

    def __init__(self, config, nets, source, rank):
        """Opens the folder; with --resume, fills the networks. Raises UserError for a folder that cannot be used."""
        self.config = config
        self.nets = nets
        self.rank = rank
        self.held_out = None
        if config.preview_every and config.stage == 2:
            self.held_out = monitor.HeldOut(nets, source)
        self.folder = from_rank_0(lambda: run_folder.open_run(config))
        self.progress = dict.fromkeys(("loops", *KINDS, "samples", "passes", "skipped_updates"), 0)
        self.progress["seconds"] = 0.0
        if config.resume and run_folder.newest(self.folder):
            self.progress = checkpoint.restore(self.folder, nets.players)
        if rank == 0:
            run_folder.write_config(self.folder, config)
        self.log = monitor.Log(self.folder, rank, config, self.progress)
        self.preview = monitor.Preview(nets, source) if config.preview_every else None
        self.watch = Watch(nets) if config.watch else None
        if config.cache_latents:
            latent_cache.fill(source, nets.vae, config, rank, nets.ranks)
        self.ending = Ending(nets.latent.device)  # before loader processes fork: they inherit its handler
        self.loader = data.batches(source, self.indices(), config.workers)
        self.began = time.time() - self.progress["seconds"]
        self.bad_loops = 0
        self.due = set()  # kinds of loop whose next loop is logged

    def indices(self):
        """The global sample numbers of this rank in every remaining loop."""
        config = self.config
        per_rank = len(self.nets.latent)
        first = self.progress["loops"] * config.batch_size + self.rank * per_rank
        starts = range(first, config.iterations * config.batch_size, config.batch_size)
        return [range(start, start + per_rank) for start in starts]

    def batches(self):
        """Line 4: this rank's batch (line 7) of every remaining loop."""
        config, nets = self.config, self.nets
        for loop in range(self.progress["loops"] + 1, config.iterations + 1):
            x_real, prompts, sizes, samples = next(self.loader)
            c = nets.encoder.encode(prompts, sizes if config.size_condition == "original" else None)
            if loop % config.log_every == 0:
                self.due = set(KINDS)
            self.passes_before = nets.passes()
            self.steps_before = nets.steps.copy()
            yield Batch(x_real.to(nets.latent.device), list(prompts), c, samples.tolist(), loop, config.seed)

    def watches(self, kind, loop):
        """Whether this loop is logged: the first of its kind after every --log-every loops, and the last loop."""
        return kind in self.due or loop == self.config.iterations

    def ends(self, batch, kind, logged):
        """After a loop: count, log, draw previews, save -> whether the run is over. logged: its {name: value}.

        Raises UserError after GIVE_UP_AFTER bad loops in a row.
        """
        config, nets, loop = self.config, self.nets, batch.loop
        skipped = self.count(batch, kind)
        if batch.watched:
            self.due.discard(kind)
            self.log.write(self.progress, monitor.average(logged, nets.ranks))
        self.log.bar(loop, logged)
        if self.preview and (loop % config.preview_every == 0 or loop == config.iterations):
            self.draw(loop)
        self.bad_loops = self.bad_loops + 1 if skipped else 0
        given_up = self.bad_loops == GIVE_UP_AFTER
        over = self.ending.asked() or loop == config.iterations
        if loop % config.save_every == 0 or over or given_up:
            self.save(background=not over and not given_up)
        if over or given_up:
            self.close()
        if given_up:
            why = f"{GIVE_UP_AFTER} loops in a row with a non-finite loss or gradient"
            raise UserError(f"{why}; saved in {self.folder} (lower the learning rates)")
        return over

    def close(self):
        """The end: signals do what they did before, and other processes may go on with the folder."""
        self.log.close()
        self.ending.close()
        run_folder.close_run(self.folder)

    def count(self, batch, kind):
        """Update the counters -> whether an optimizer skipped its step in this loop."""
        nets = self.nets
        progress = self.progress
        new = nets.steps - self.steps_before
        skipped = any(not stepped for _, stepped in new)
        progress["loops"] = batch.loop
        progress[kind] += new[KINDS[kind], True]
        progress["samples"] += self.config.batch_size
        progress["passes"] += (nets.passes() - self.passes_before) * nets.ranks
        progress["skipped_updates"] += skipped
        progress["seconds"] = time.time() - self.began
        progress["ranks"] = nets.ranks
        return skipped

    def draw(self, loop):
        """A preview picture, the student's diversity, in stage 2 the held-out scores, those of --watch; a warning."""
        seen = self.preview.draw(self.folder / f"preview-{loop:06d}.png", self.nets.G, self.rank)
        if self.held_out:
            seen |= self.held_out.look(self.nets.G)
        if self.watch:
            seen |= self.watch.look(self.nets.G)
        self.log.write(self.progress, seen)
        if self.rank == 0:
            self.log.warn(doctor.warning(self.folder))

    def save(self, background):
        """Write a checkpoint, on CUDA in the background (except torchao's moments, which cannot be copied aside)."""
        nets = self.nets
        can = nets.latent.device.type == "cuda" and self.config.optimizer == "adamw"
        checkpoint.save(self.folder, nets.players, self.progress, self.config.keep, background=background and can)
