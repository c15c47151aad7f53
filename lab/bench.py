"""Where an iteration's time goes: each network pass and optimizer step timed alone, their sum beside whole iterations.

    python -m lab.bench --size toy                    or sdxl, sd3: random weights (7 GB of disk), random pictures
    python -m lab.bench --size sdxl --batch-size 2    any flag of train.py may follow

Without --size the flags say which model and data; by default the toy. Below the passes: samples per second, peak
memory, counted floating-point operations, and their share of the rate at which this device multiplies matrices (bf16 on
CUDA, else fp32).
"""

import argparse
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

import dmd
import pixel_gan
import score_estimator
import train
from engine import data
from engine.batch import Batch
from engine.distributed import start_process
from engine.errors import UserError
from engine.flags import at_least, fail
from engine.loop import Run
from engine.networks import assemble
from engine.run_folder import look
from lab import random_models, rows

SIZES = {
    "toy": (),
    "sdxl": ("--preset", "sdxl-4step", "--batch-size", "2"),
    "sd3": ("--preset", "sd3-4step", "--batch-size", "2", "--ttur", "1"),
}


def stand_in(size, folder, argv):
    """argv with a model of this size (the toy's own; the others have random weights) and random pictures.

    Both are written to `folder`.
    """
    argv = [*SIZES[size], *argv]
    paths = {"--data": folder / "pictures"}
    random_models.pictures(folder / "pictures", train.read(argv).resolution)
    if size != "toy":
        model, sam = random_models.write(size, folder)
        paths |= {"--model": model, "--sam": sam, "--clip": "toy/clip"}
    return [*map(str, rows.flat(paths)), *argv]


def rollouts(config):
    """How many passes of G without gradient an iteration of reading (b) makes, as the mean over the step i.

    They lead to x at step i, and on to the last step.
    """
    K = config.student_steps
    if K == 1:
        return 0
    return K - 2 + (1 / K if config.dm_steps == "all" else 0)  # where i is the last step, x is made once more


def passes(nets):
    """-> {name: (function, how many times an iteration of reading (b) at TTUR 1 needs it)}.

    A function may return its own seconds.
    """
    config, encoder, vae, G, fake, D = nets.config, nets.encoder, nets.vae, nets.G, nets.fake, nets.D
    n, device = config.batch_size, nets.latent.device
    source = data.source(config.data, config.resolution)
    images = torch.stack([source[i][0] for i in range(n)]).to(device)
    c = encoder.encode([source[i][1] for i in range(n)])
    z = vae.encode(images)
    t = torch.full((n,), 499, device=device)
    x = torch.randn_like(z)
    with_gradient = z.clone().requires_grad_()
    seen, pixels = pixel_gan.window(config.gan_crop, z, vae.factor, config.seed, 1)
    reals = images[pixels]
    picture = reals.clone().requires_grad_()
    features = [f.detach() for f in D.features(reals)]
    of_G = [f.clone().requires_grad_() for f in features]

    def backward(loss, *modules):
        loss.backward()
        for m in modules:
            m.zero_grad(set_to_none=True)

    def heads_for_G():
        D.requires_grad_(False)
        backward(pixel_gan.generator_loss(D(of_G)))
        D.requires_grad_(True)

    def heads_alone():
        backward(pixel_gan.discriminator_loss(D(features), D(features)), D)

    no_grad = torch.no_grad()
    return {
        "data and prompts": (lambda: encoder.encode([source[i][1] for i in range(n)]), 1),
        "rollout (G forward)": (no_grad(lambda: G(x, t, c)), rollouts(config)),
        "G forward, backward": (lambda: backward(G(x, t, c).square().mean(), G.net), 2),
        "teacher, guided": (no_grad(lambda: nets.guided_teacher(x, t, c)), 1),
        "fake forward": (no_grad(lambda: fake(x, t, c)), 1),
        "fake forward, backward (Eq. 6)": (lambda: backward(score_estimator.loss(fake, x, t, z, c), fake.net), 1),
        "VAE forward, backward (Eq. 9)": (lambda: backward(vae.decode(with_gradient[seen]).mean()), 1),
        "SAM forward, backward (Eq. 9)": (lambda: backward(sum(f.mean() for f in D.features(picture))), 1),
        "heads forward, backward (Eq. 9)": (heads_for_G, 1),
        "SAM on reals": (no_grad(lambda: D.features(reals)), 1),
        "heads forward, backward (Eq. 10)": (heads_alone, 1),
        "DM loss": (lambda: dmd.loss(with_gradient, x).backward(), 1),
        "EMA pull (Eq. 11)": (lambda: score_estimator.pull(nets.weights("fake"), nets.weights("G"), config.ema), 1),
        **{f"optimizer step, {k}": (lambda k=k: step(nets, k), 1) for k in nets.players},
    }


def step(nets, name):
    """Seconds of one optimizer step of a player, with gradients that are there already."""
    for p in nets.weights(name):
        p.grad = torch.zeros_like(p)
    wait()
    began = time.perf_counter()
    nets.step(name, torch.zeros((), device=nets.latent.device), nets.config.clip_grad)
    wait()
    return time.perf_counter() - began


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def iteration(nets, loops):
    """Seconds per loop as train.py runs it, data and counters included, after five loops; without logs and pictures."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"preview_every": 0, "log_every": 10**6, "save_every": 10**6, "out": f"{folder}/run"}
        config = nets.config = replace(nets.config, iterations=loops + 6, **quiet)
        run = Run(config, nets, data.source(config.data, config.resolution, config.seed), rank=0)
        for batch in run.batches():
            wait()
            if batch.loop == 6:
                began = time.perf_counter()
            if batch.loop == config.iterations:  # the last loop is watched and saved
                break
            nets.pace(batch.loop)
            run.ends(batch, "generator_updates", train.flash(nets, batch, batch.loop))
        seconds = time.perf_counter() - began
        run.log.close()
    return seconds / loops


def operations(nets):
    """Floating-point operations of one iteration, those that checkpointing repeats included."""
    config, n = nets.config, len(nets.latent)
    images = torch.zeros(n, 3, config.resolution, config.resolution, device=nets.latent.device)
    prompts = ["a red circle"] * n
    with FlopCounterMode(display=False) as counter:
        batch = Batch(images, prompts, nets.encoder.encode(prompts), list(range(n)), loop=1)
        train.flash(nets, batch, config.ttur)
    return counter.get_total_flops()


def matrix_rate(device, repeats):
    """FLOP/s of a large matrix product: what this device can do at best."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / median(seconds)


def bench(argv, loops, repeats):
    """Print the table of a run with these flags. Raises UserError."""
    rank, ranks, device = start_process()
    config = look(train.read(argv))
    timed = (config.stage, config.method, config.gan_reals, config.adv_reading, config.ttur)
    if timed != (1, "flash", "raw", "b", 1) or not config.gan_weight:
        left_out = "leave --method, --gan-weight 0, --gan-reals and --adv-reading out"
        raise UserError(f"lab.bench times stage 1 with Pixel-GAN: {left_out}, and pass --ttur 1")
    nets = assemble(config, ranks, device, train.prepare)
    total = print_passes(passes(nets), repeats)
    n = config.batch_size
    flops = operations(nets)
    rate = matrix_rate(device, repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    whole = iteration(nets, loops)
    print(f"| sum | | | {total:.1f} |")
    print(f"| one iteration of train.py | | | {1000 * whole:.1f} |")
    print(f"| ratio | | | {1000 * whole / total:.2f} |")
    speed = f"{n / whole:.2f} samples per second; peak memory {peak / 1e9:.2f} GB"
    print(f"\n{speed}; {flops / 1e12:.3f} TFLOP a loop, so {flops / whole / 1e12:.3f} a")
    print(
        f"second: {flops / whole / rate:.0%} of the {rate / 1e12:.3f} TFLOP/s at which this device multiplies matrices"
    )


def print_passes(table, repeats):
    """Time the passes, print them -> milliseconds of an iteration, the sum over passes."""
    total = 0.0
    times = {name: [] for name in table}
    for repeat in range(repeats + 1):  # round after round, so that a slow spell of the machine meets all of them
        for name, (f, _) in table.items():
            wait()
            began = time.perf_counter()
            inner = f()
            wait()
            if repeat:
                times[name].append(inner if isinstance(inner, float) else time.perf_counter() - began)
    print("| pass | ms | times | ms per iteration |\n| --- | --- | --- | --- |")
    for name, (_, count) in table.items():
        ms = 1000 * median(times[name])
        total += ms * count
        print(f"| {name} | {ms:.1f} | {count} | {ms * count:.1f} |")
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, help="the toy, or a real size with random weights; default: the flags")
    parser.add_argument("--loops", type=at_least(1), default=20)
    parser.add_argument("--repeats", type=at_least(1), default=15)
    args, argv = parser.parse_known_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench(stand_in(args.size, Path(folder), argv) if args.size else argv, args.loops, args.repeats)
    except UserError as e:
        fail(e)


if __name__ == "__main__":
    main()
