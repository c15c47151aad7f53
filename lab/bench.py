"""Where an iteration's time goes: each network pass and optimizer step timed alone, their sum beside whole iterations.

python -m lab.bench
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import data
import distributed
import dmd
import pixel_gan
import score_estimator
from config import Config
from diffusion import guided
from lab import rows
from models import load_denoiser, load_encoder, load_sam, load_vae


def passes(config):
    """-> {name: (function, how many times an iteration of reading (b) at TTUR 1 needs it)}."""
    n = config.batch_size
    encoder, vae = load_encoder(config.model, config.resolution), load_vae(config.model)
    teacher, G, fake = (load_denoiser(config.model) for _ in range(3))
    teacher.net.requires_grad_(False)
    D = pixel_gan.PixelDiscriminator(load_sam(config.sam))
    guided_teacher = guided(teacher, encoder.null(), config.guidance)
    source = data.source(config.data, config.resolution)
    images, prompts = torch.stack([source[i][0] for i in range(n)]), [source[i][1] for i in range(n)]
    c, z, t = encoder.encode(prompts), vae.encode(images), torch.full((n,), 499)
    x, with_gradient = torch.randn_like(z), z.clone().requires_grad_()
    features = [f.detach() for f in D.features(images)]
    optimizers = {k: (m, torch.optim.AdamW(m.parameters())) for k, m in {"G": G.net, "fake": fake.net, "D": D}.items()}

    def backward(loss, *modules):
        loss.backward()
        for m in modules:
            m.zero_grad(set_to_none=True)

    def generator_turn():
        D.requires_grad_(False)
        backward(pixel_gan.generator_loss(D(D.features(vae.decode(with_gradient)))))
        D.requires_grad_(True)

    def step(name):
        module, optimizer = optimizers[name]
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        began = time.perf_counter()
        distributed.update(optimizer, torch.zeros(()), config.clip_grad)
        return time.perf_counter() - began

    no_grad = torch.no_grad()
    return {
        "data and prompts": (lambda: encoder.encode([caption for _, caption in [source[i] for i in range(n)]]), 1),
        "rollout (G forward)": (no_grad(lambda: G(x, t, c)), 2),
        "G forward, backward": (lambda: backward(G(x, t, c).square().mean(), G.net), 2),
        "teacher, guided": (no_grad(lambda: guided_teacher(x, t, c)), 1),
        "fake forward": (no_grad(lambda: fake(x, t, c)), 1),
        "fake forward, backward (Eq. 6)": (lambda: backward(score_estimator.loss(fake, x, t, z, c), fake.net), 1),
        "VAE, SAM, heads forward, backward to x_adv (Eq. 9)": (generator_turn, 1),
        "SAM on reals": (no_grad(lambda: D.features(images)), 1),
        "heads forward, backward (Eq. 10)": (lambda: backward(pixel_gan.discriminator_loss(D(features), D(features)), D), 1),
        "DM loss": (lambda: dmd.loss(with_gradient, x).backward(), 1),
        "EMA pull (Eq. 11)": (lambda: score_estimator.pull(fake.net.parameters(), G.net.parameters(), 0.99), 1),
        **{f"optimizer step, {k}": (lambda k=k: step(k), 1) for k in optimizers},
    }


def iteration(loops):
    """Seconds per loop of a real run, start-up, pictures and logs left out: a long run less a short one."""
    seconds = []
    for n in (5, 5 + loops):
        with tempfile.TemporaryDirectory() as folder:
            run, flags = Path(folder) / "run", {"--preview-every": 0, "--log-every": 10**6, "--save-every": 10**6, "--iterations": n}
            rows.command("train.py", "--out", run, *rows.flat(flags), threads=torch.get_num_threads())
            seconds.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"])
    return (seconds[1] - seconds[0]) / loops


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loops", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    table, total = passes(Config()), 0.0
    times = {name: [] for name in table}
    for repeat in range(args.repeats + 1):  # round after round, so that a slow spell of the machine meets all of them
        for name, (f, _) in table.items():
            began = time.perf_counter()
            inner = f()
            if repeat:
                times[name].append(inner if isinstance(inner, float) else time.perf_counter() - began)
    print("| pass | ms | times | ms per iteration |\n| --- | --- | --- | --- |")
    for name, (_, count) in table.items():
        ms = 1000 * median(times[name])
        total += ms * count
        print(f"| {name} | {ms:.1f} | {count} | {ms * count:.1f} |")
    whole = 1000 * iteration(args.loops)
    print(f"| sum | | | {total:.1f} |\n| one iteration of train.py | | | {whole:.1f} |\n| ratio | | | {whole / total:.2f} |")


if __name__ == "__main__":
    main()
