"""The toy's latent reward model: preference pairs that come from the world itself, and its training on them (LPO, arXiv 2502.01051).

A pair is a scene's picture and a worse one for the same caption; no generator has a part in it.
"""

import dataclasses
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from diffusion import Schedule, add_noise
from latent_reward import LatentRewardModel, bradley_terry
from models import VAE, PromptEncoder
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
    spots = [(i, name) for i, facts in enumerate(stated) for name in facts] + [(None, name) for name in ground]
    i, name = spots[rng.integers(len(spots))]
    options = {"shape": world.SHAPES, "color": world.COLORS, "size": world.SIZES, "fill": world.FILLS, "background": world.BACKGROUNDS}[name]
    changed = scene if i is None else scene.objects[i]
    value = rng.choice([v for v in options if v != getattr(changed, name)])
    changed = dataclasses.replace(changed, **{name: str(value)})
    objects = changed.objects if i is None else (*scene.objects[:i], changed, *scene.objects[i + 1 :])
    return world.render(dataclasses.replace(changed if i is None else scene, objects=objects))


def pairs(count, split):
    """-> latents of better and worse pictures, (count, 4, 16, 16) each, and their captions."""
    vae, better, worse, captions = VAE(HERE / "sdxl"), [], [], []
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
    folder, schedule = HERE / "lrm", Schedule()
    unet = UNet2DConditionModel.from_pretrained(HERE / "sdxl" / "unet").float()
    whole = {k: v.clone() for k, v in unet.state_dict().items()}
    encoder = PromptEncoder(HERE / "sdxl", world.SIZE)
    reward = LatentRewardModel(unet, encoder, encoder.encoders[1].config.projection_dim)
    batch, count = 32, 8192
    better, worse, captions = pairs(count, "train")
    encoded = [encoder.encode(captions[i : i + 256]) for i in range(0, count, 256)]
    conditions = {k: torch.cat([e[k] for e in encoded]) for k in encoded[0]}

    def scores(win, lose, c, t):
        """Both latents of every pair at the pair's own t, each with noise of its own."""
        both = add_noise(schedule, torch.cat([win, lose]), t.repeat(2), torch.randn(2 * len(win), 4, 16, 16))
        return reward(both, t.repeat(2), {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in c.items()}).chunk(2)

    def loss(step):
        which, t = torch.randint(count, (batch,)), torch.randint(1, 952, (batch,))
        return bradley_terry(*scores(better[which], worse[which], {k: v[which] for k, v in conditions.items()}, t))

    began = time.time()
    fit("lrm", [reward], loss, steps=1500, lr=5e-4, weight_decay=0.01)
    reward.eval().requires_grad_(False)
    better, worse, captions = pairs(512, "test")
    c, right = encoder.encode(captions), {}
    torch.manual_seed(0)
    for t in (50, 250, 500, 749):
        win, lose = scores(better, worse, c, torch.full((512,), t))
        right[f"right_at_t_{t}"] = (win > lose).float().mean().item()
    reward.half()
    whole |= unet.state_dict()  # the published layout has the up blocks, which the reward model drops
    full = UNet2DConditionModel.from_config(unet.config)
    full.load_state_dict(whole)
    full.half().save_pretrained(folder / "unet")
    for name, net in zip(("text_encoder", "text_encoder_2"), encoder.encoders):
        net.half().save_pretrained(folder / name)
    torch.save({"visual_projection": reward.visual_projection.state_dict(), "logit_scale": reward.logit_scale.item()}, folder / "state_dict.pt")
    forget_path(folder)
    report("lrm", time.time() - began, parameters=sum(p.numel() for p in reward.parameters()), **right)
