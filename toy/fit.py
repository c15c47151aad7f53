"""Common to the parts of toy/build.py: the training scenes, the training loop, and the report in toy/quality.json."""

import json
import math
from functools import cache
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from toy import world

HERE = Path(__file__).parent


@cache
def scenes(count=32768, split="train"):
    """-> images (count, 3, 64, 64) in [-1, 1], captions, masks (count, 64, 64) of the split's first scenes."""
    drawn = [world.scene(i, split) for i in tqdm(range(count), desc=f"scenes, {split}", mininterval=5)]
    images = torch.stack([world.render(s) for s, _ in drawn])
    captions = [c for _, c in drawn]
    masks = torch.stack([world.labels(s) for s, _ in drawn])
    return images, captions, masks


@cache
def crowds(count=16384):
    """-> images (count, 3, 64, 64), masks (count, 64, 64) of the first crowded scenes."""
    drawn = [world.crowd(i) for i in tqdm(range(count), desc="crowds", mininterval=5)]
    images = torch.stack([world.render(s) for s in drawn])
    masks = torch.stack([world.labels(s) for s in drawn])
    return images, masks


def crowd_of(size):
    """`size` random crowded scenes -> images, masks."""
    images, masks = crowds()
    which = torch.randint(len(images), (size,))
    return images[which], masks[which]


def batch_of(size):
    """`size` random scenes of the training split -> images, captions, masks."""
    images, captions, masks = scenes()
    which = torch.randint(len(images), (size,))
    return images[which], [captions[i] for i in which], masks[which]


def fit(name, modules, loss, steps, lr, weight_decay=0.0, muon=()):
    """Minimise loss(step) by AdamW with warm-up and cosine decay to lr / 100; `modules` end with their weights' EMA.

    muon: matrices trained by Muon instead, at 10 times the rate. Saves its state every 250 steps and goes on from it.
    """
    params = [p for m in modules for p in m.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in params]
    others = [p for p in params if all(p is not m for m in muon)]
    optimizers = {torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay): lr}
    if muon:
        optimizers[torch.optim.Muon(muon, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")] = 10 * lr
    state = HERE / ".build" / f"{name}.pt"
    start = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        start = saved["step"]
        for optimizer, moments in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        for p, a, sp, sa in zip(params, average, saved["params"], saved["average"], strict=True):
            p.data.copy_(sp)
            a.copy_(sa)
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=5)
    for step in bar:
        torch.manual_seed(step)
        rate = min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(step / steps * math.pi)))
        value = loss(step)
        for p in params:
            p.grad = None
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer, full in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = full * rate
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - min(0.999, step / (step + 10)))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
        if (step + 1) % 250 == 0 and step + 1 < steps:
            state.parent.mkdir(exist_ok=True)
            moments = [optimizer.state_dict() for optimizer in optimizers]
            aside = state.with_suffix(".tmp")
            torch.save({"step": step + 1, "optimizers": moments, "params": params, "average": average}, aside)
            aside.replace(state)
    with torch.no_grad():
        for p, a in zip(params, average):
            p.copy_(a)
    state.unlink(missing_ok=True)


def report(part, seconds, at_least=(), **reached):
    """Write a part's metrics to toy/quality.json. at_least: {metric: bar}. Raises SystemExit for one below its bar."""
    for measure, bar in dict(at_least).items():
        if reached[measure] < bar:
            raise SystemExit(f"{part}: {measure} is {reached[measure]:.3f}, below {bar}: nothing can be built on it")
    path = HERE / "quality.json"
    quality = json.loads(path.read_text()) if path.exists() else {}
    quality[part] = {k: round(v, 4) if isinstance(v, float) else v for k, v in reached.items()}
    quality[part]["minutes"] = round(seconds / 60, 1)
    path.write_text(json.dumps(quality, indent=2) + "\n")
    print(part, quality[part])


def forget_path(folder):
    """Drop "_name_or_path" from saved configs: diffusers and transformers write a path of this machine there."""
    for config in folder.glob("*/config.json"):
        kept = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")


def accuracies(images, captions):
    """The fraction of pictures that match their captions, and of true facts per attribute, as a dict."""
    whole, attributes = world.judge(images, captions)
    found = {"prompt_accuracy": sum(whole) / len(whole)}
    for kind, true in sorted(attributes.items()):
        found[kind] = sum(true) / len(true)
    return found
