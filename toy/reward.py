"""The toy's latent reward model: preference pairs that come from the world itself, and its training on them (LPO, arXiv 2502.01051).

A pair is a scene's picture and a worse one for the same caption; no generator has a part in it.
"""

import dataclasses
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from diffusion import Schedule
from latent_reward import LatentRewardModel, bradley_terry, pair_scores
from models import load_vae
from toy import world
from toy.fit import HERE, fit, forget_path, report


def spoilt(scene, text, image, other, rng):
    """A worse picture for the caption: a stated fact made false, or the right picture blurred, over-saturated or mixed with another."""
    kind = rng.choice(["fact", "blurred", "saturated", "mixed"], p=[0.7, 0.1, 0.1, 0.1])
    if kind == "blurred":
        return F.avg_pool2d(F.pad(image[None], (2, 2, 2, 2), mode="reflect"), 5, 1)[0]
    if kind == "saturated":
        gray = image.mean(0, keepdim=True)
        return (gray + rng.uniform(1.5, 2.5) * (image - gray)).clamp(-1, 1)
    if kind == "mixed":
        return image.lerp(other, rng.uniform(0.3, 0.7))
    stated, ground = world.parse(text)
    while True:
        changed = altered(scene, stated, ground, rng)
        if not all(map(all, world.check(changed, text).values())):  # of two like objects, one may stand in for the other
            return world.render(changed)


def altered(scene, stated, ground, rng):
    """The scene with one fact that its caption states made false."""
    spots = [(i, name) for i, facts in enumerate(stated) for name in facts] + [(None, name) for name in ground]
    i, name = spots[rng.integers(len(spots))]
    options = {"shape": world.SHAPES, "color": world.COLORS, "size": world.SIZES, "fill": world.FILLS, "background": world.BACKGROUNDS}[name]
    changed = scene if i is None else scene.objects[i]
    value = rng.choice([v for v in options if v != getattr(changed, name)])
    changed = dataclasses.replace(changed, **{name: str(value)})
    objects = changed.objects if i is None else (*scene.objects[:i], changed, *scene.objects[i + 1 :])
    return dataclasses.replace(changed if i is None else scene, objects=objects)


def pairs(count, split):
    """-> latents of better and worse pictures, (count, 4, 16, 16) each, and their captions."""
    vae, better, worse, captions = load_vae(HERE / "sdxl"), [], [], []
    rng = np.random.default_rng(count)
    for start in tqdm(range(0, count, 128), desc=f"pairs, {split}", mininterval=5):
        drawn = [world.scene(i, split) for i in range(start, start + 128)]
        images = [world.render(s) for s, _ in drawn]
        bad = [spoilt(s, text, image, other, rng) for (s, text), image, other in zip(drawn, images, images[1:] + images[:1])]
        better.append(vae.encode(torch.stack(images)))
        worse.append(vae.encode(torch.stack(bad)))
        captions += [text for _, text in drawn]
    return torch.cat(better), torch.cat(worse), captions


def build_lrm():
    model, schedule, batch = HERE / "sdxl", Schedule(), 32
    R = LatentRewardModel.from_pipeline(model, world.SIZE)
    better, worse, captions = pairs(16384, "train")
    encoded = [R.encoder.encode(captions[i : i + 256]) for i in range(0, len(captions), 256)]
    conditions = {k: torch.cat([e[k] for e in encoded]) for k in encoded[0]}

    def loss(step):
        which, t = torch.randint(len(better), (batch,)), torch.randint(1, 952, (batch,))
        noise = torch.randn(2, batch, 4, 16, 16)
        return bradley_terry(*pair_scores(R, schedule, better[which], worse[which], t, *noise, {k: v[which] for k, v in conditions.items()}))

    began = time.time()
    fit("lrm", [R], loss, steps=4000, lr=5e-4, weight_decay=0.01)
    R.eval().requires_grad_(False)
    better, worse, captions = pairs(512, "test")
    c, right = R.encoder.encode(captions), {}
    torch.manual_seed(0)
    for t in (50, 250, 500, 749):
        win, lose = pair_scores(R, schedule, better, worse, torch.full((512,), t), *torch.randn(2, *better.shape), c)
        right[f"right_at_t_{t}"] = (win > lose).float().mean().item()
    R.save_pretrained(HERE / "lrm", model, half=True)
    forget_path(HERE / "lrm")
    report("lrm", time.time() - began, parameters=sum(p.numel() for p in R.parameters()), **right)
