"""The toy's latent reward models: preference pairs from the toy world, and training on them (LPO, arXiv 2502.01051).

A pair is a scene's picture and a worse one for the same caption. No generator draws either. SDXL's latents and SD3's
are scored by models of their own, trained by the same loss, that of `--stage reward`: SDXL's on 32,768 pairs, SD3's on
the first quarter of them.
"""

import dataclasses
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine.models import load_schedule, load_vae
from engine.reward_model import save_reward_model, untrained_reward_model
from latent_reward import bradley_terry, pair_scores
from toy import world
from toy.fit import HERE, fit, forget_path, report

KINDS = {"fact": 0.35, "facts": 0.25, "blurred": 0.1, "saturated": 0.1, "mixed": 0.2}  # of worse pictures: fractions


def spoilt(kind, scene, text, image, other, rng):
    """A worse picture for the caption, of a kind of KINDS.

    "fact", "facts": one or all of its facts made false; the others: the right picture blurred, over-saturated, or mixed
    with the picture `other`.
    """
    if kind == "blurred":
        return F.avg_pool2d(F.pad(image[None], (5, 5, 5, 5), mode="reflect"), 11, 1)[0]
    if kind == "saturated":  # and over-contrasted, as too much guidance leaves it
        gray = image.mean(0, keepdim=True)
        return (1.5 * (gray + rng.uniform(3, 5) * (image - gray))).clamp(-1, 1)
    if kind == "mixed":
        return image.lerp(other, rng.uniform(0.3, 0.7))
    stated = world.parse(text)
    names = rng.permutation(list(stated))
    return world.render(altered(scene, stated, names[:1] if kind == "fact" else names, rng))


def altered(scene, stated, names, rng):
    """The scene with the facts `names` made false. stated: the facts of its caption."""
    (o,) = scene.objects
    background = scene.background
    options = {
        "shape": world.SHAPES,
        "color": world.COLORS,
        "size": world.SIZES,
        "fill": world.FILLS,
        "background": world.BACKGROUNDS,
    }
    for name in names:
        if name in ("row", "column"):
            o = dataclasses.replace(o, cell=o.cell ^ (2 if name == "row" else 1))
            continue
        wrong = str(rng.choice([v for v in options[name] if v != stated[name]]))
        if name == "background":
            background = wrong
        else:
            o = dataclasses.replace(o, **{name: wrong})
    return dataclasses.replace(scene, background=background, objects=(o,))


def pairs(count, split, first=None):
    """-> latents of better and worse pictures, (count, 4, 16, 16) each, captions, and the kinds of the worse.

    first: only so many of them.
    """
    vae = load_vae(HERE / "sdxl")
    better = []
    worse = []
    captions = []
    rng = np.random.default_rng(count)
    kinds = rng.choice(list(KINDS), count, p=list(KINDS.values()))
    for start in tqdm(range(0, first or count, 128), desc=f"pairs, {split}", mininterval=5):
        drawn = [world.scene(i, split) for i in range(start, start + 128)]
        images = [world.render(s) for s, _ in drawn]
        parts = zip(kinds[start:], drawn, images, images[1:] + images[:1])
        bad = [spoilt(kind, s, text, image, other, rng) for kind, (s, text), image, other in parts]
        better.append(vae.encode(torch.stack(images)))
        worse.append(vae.encode(torch.stack(bad)))
        captions += [text for _, text in drawn]
    return torch.cat(better), torch.cat(worse), captions, kinds


def build_lrm():
    at_least = {"right_at_t_50": 0.9, "right_at_t_250": 0.9, "right_at_t_500": 0.9, "right_at_t_749": 0.75}
    build("lrm", HERE / "sdxl", 32, 7000, 1.5e-3, 900, (50, 250, 500, 749), at_least)


def build_sd3_lrm():
    at_least = {"right_at_t_500": 0.9, "right_at_t_750": 0.8, "right_at_t_900": 0.6}
    build("sd3_lrm", HERE / "sd3", 16, 1000, 1.5e-3, 952, (50, 250, 500, 750, 900), at_least, first=8192)


def build(part, model, batch, steps, lr, noisiest, levels, at_least, first=None):
    """Train a part, the reward model of pipeline `model`, on t below `noisiest`; report its accuracy at `levels`."""
    schedule = load_schedule(model)
    R = untrained_reward_model(model, world.SIZE)
    trained = sum(p.numel() for p in R.parameters() if p.requires_grad)
    better, worse, captions, _ = pairs(32768, "train", first)
    encoded = [R.encoder.encode(captions[i : i + 256]) for i in range(0, len(captions), 256)]
    conditions = {k: torch.cat([e[k] for e in encoded]) for k in encoded[0]}

    def loss(step):
        which = torch.randint(len(better), (batch,))
        t = torch.randint(1, noisiest, (batch,))
        eps_win, eps_lose = torch.randn(2, batch, 4, 16, 16)
        c = {k: v[which] for k, v in conditions.items()}
        return bradley_terry(*pair_scores(R, schedule, better[which], worse[which], t, eps_win, eps_lose, c))

    began = time.time()
    fit(part, [R], loss, steps=steps, lr=lr, weight_decay=0.01)
    trained = sum(p.numel() for p in R.parameters() if p.requires_grad)
    R.eval().requires_grad_(False)
    better, worse, captions, kinds = pairs(1024, "test")
    c = R.encoder.encode(captions)
    right = {}
    torch.manual_seed(0)
    for t in levels:
        eps_win, eps_lose = torch.randn(2, *better.shape)
        level = torch.full((len(better),), t)
        win, lose = pair_scores(R, schedule, better, worse, level, eps_win, eps_lose, c)
        right[f"right_at_t_{t}"] = (win > lose).float().mean().item()
        if t == 500:
            for kind in KINDS:
                ranked = (win > lose)[torch.from_numpy(kinds == kind)]
                right[f"right_at_t_500_{kind}"] = ranked.float().mean().item()
    save_reward_model(R, HERE / part, model, half=True)
    forget_path(HERE / part)
    report(part, time.time() - began, at_least, parameters=trained, **right)
