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

KINDS = {"fact": 0.5, "blurred": 0.125, "saturated": 0.125, "mixed": 0.25}  # of worse pictures, and their shares


def spoilt(kind, scene, text, image, other, rng):
    """A worse picture for the caption: a stated fact made false, or the right picture blurred, over-saturated or mixed with another."""
    if kind == "blurred":
        return F.avg_pool2d(F.pad(image[None], (3, 3, 3, 3), mode="reflect"), 7, 1)[0]
    if kind == "saturated":
        gray = image.mean(0, keepdim=True)
        return (gray + rng.uniform(2, 3) * (image - gray)).clamp(-1, 1)
    if kind == "mixed":
        return image.lerp(other, rng.uniform(0.3, 0.7))
    return world.render(altered(scene, text, rng))


def altered(scene, text, rng):
    """The scene with one fact that its caption states made false."""
    stated = world.parse(text)
    name = list(stated)[rng.integers(len(stated))]
    if name in ("row", "column"):
        change = {"cell": scene.objects[0].cell ^ (2 if name == "row" else 1)}
    else:
        options = {"shape": world.SHAPES, "color": world.COLORS, "size": world.SIZES, "fill": world.FILLS, "background": world.BACKGROUNDS}[name]
        change = {name: str(rng.choice([v for v in options if v != stated[name]]))}
    if name == "background":
        return dataclasses.replace(scene, **change)
    return dataclasses.replace(scene, objects=(dataclasses.replace(scene.objects[0], **change),))


def pairs(count, split):
    """-> latents of better and worse pictures, (count, 4, 16, 16) each, their captions, and what is wrong with the worse."""
    vae, better, worse, captions = load_vae(HERE / "sdxl"), [], [], []
    rng = np.random.default_rng(count)
    kinds = rng.choice(list(KINDS), count, p=list(KINDS.values()))
    for start in tqdm(range(0, count, 128), desc=f"pairs, {split}", mininterval=5):
        drawn = [world.scene(i, split) for i in range(start, start + 128)]
        images = [world.render(s) for s, _ in drawn]
        parts = zip(kinds[start:], drawn, images, images[1:] + images[:1])
        bad = [spoilt(kind, s, text, image, other, rng) for kind, (s, text), image, other in parts]
        better.append(vae.encode(torch.stack(images)))
        worse.append(vae.encode(torch.stack(bad)))
        captions += [text for _, text in drawn]
    return torch.cat(better), torch.cat(worse), captions, kinds


def build_lrm():
    model, schedule, batch = HERE / "sdxl", Schedule(), 32
    R = LatentRewardModel.from_pipeline(model, world.SIZE)
    better, worse, captions, _ = pairs(32768, "train")
    encoded = [R.encoder.encode(captions[i : i + 256]) for i in range(0, len(captions), 256)]
    conditions = {k: torch.cat([e[k] for e in encoded]) for k in encoded[0]}

    def loss(step):
        which, t = torch.randint(len(better), (batch,)), torch.randint(1, 952, (batch,))
        noise = torch.randn(2, batch, 4, 16, 16)
        return bradley_terry(*pair_scores(R, schedule, better[which], worse[which], t, *noise, {k: v[which] for k, v in conditions.items()}))

    began = time.time()
    fit("lrm", [R], loss, steps=6000, lr=1.5e-3, weight_decay=0.01)
    R.eval().requires_grad_(False)
    better, worse, captions, kinds = pairs(1024, "test")
    c, right = R.encoder.encode(captions), {}
    torch.manual_seed(0)
    for t in (50, 250, 500, 749):
        win, lose = pair_scores(R, schedule, better, worse, torch.full((len(better),), t), *torch.randn(2, *better.shape), c)
        right[f"right_at_t_{t}"] = (win > lose).float().mean().item()
        if t == 500:
            of = {kind: (win > lose)[torch.from_numpy(kinds == kind)] for kind in KINDS}
            right |= {f"right_at_t_500_{kind}": judged.float().mean().item() for kind, judged in of.items()}
    R.save_pretrained(HERE / "lrm", model, half=True)
    forget_path(HERE / "lrm")
    report("lrm", time.time() - began, parameters=sum(p.numel() for p in R.parameters()), **right)
