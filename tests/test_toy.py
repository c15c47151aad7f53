"""The toy world: its checker is exact, its splits are disjoint, its weights are what a diffusers user expects."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffusion import guided, sample_generators
from engine import metrics
from engine.models import load_denoiser, load_vae
from engine.pictures import generate
from engine.prompts import PromptEncoder
from toy import reward, world


def scenes(n, split="test", start=0):
    pairs = [world.scene(i, split) for i in range(start, start + n)]
    return torch.stack([world.render(s) for s, _ in pairs]), [c for _, c in pairs], [s for s, _ in pairs]


def test_checker_reads_rendered_scenes_exactly():
    images, captions, truth = scenes(300, "train")
    assert [found == s for found, s in zip(world.detect(images), truth)] == [True] * 300
    whole, attributes = world.judge(images, captions)
    assert all(whole) and len(attributes) == 8


def test_checker_reads_vae_reconstructions():
    images, captions, _ = scenes(200, "train")
    vae = load_vae("toy/sdxl")
    with torch.no_grad():
        _, attributes = world.judge(vae.decode(vae.encode(images)), captions)
    for name, values in attributes.items():
        assert sum(values) / len(values) >= 0.97, name


def test_checker_refuses_wrong_captions_noise_and_mush():
    images, captions, truth = scenes(100, "train")
    others = captions[1:] + captions[:1]
    whole, _ = world.judge(images, others)
    assert whole == [
        all(world.check(s, c).values()) for s, c in zip(truth, others)
    ]  # a short caption may fit another scene
    assert sum(whole) < 10
    for broken in (
        torch.randn_like(images),
        torch.nn.functional.avg_pool2d(images, 21, 1, 10),
    ):  # an object is 16 or 24 pixels wide
        assert sum(world.judge(broken, captions)[0]) <= 5


def test_each_attribute_is_checked():
    circle, ring = (
        world.Object("circle", "red", "large", "striped", 0),
        world.Object("ring", "blue", "small", "plain", 1),
    )
    image = world.render(world.Scene("gray", "plain", (circle,)))[None]
    true = "a large striped red circle at the top left on a gray background"
    assert world.judge(image, [true])[0] == [True]
    wrong = {
        "large": "small",
        "striped": "plain",
        "red": "green",
        "circle": "cross",
        "top": "bottom",
        "left": "right",
        "gray": "tan",
    }
    for word, other in wrong.items():
        assert world.judge(image, [true.replace(word, other)])[0] == [False], other
    for objects in [(), (circle, ring)]:
        whole, attributes = world.judge(world.render(world.Scene("gray", "plain", objects))[None], [true])
        assert whole == [False] and attributes["count"] == [False] and attributes["shape"] == [bool(objects)]
    assert world.judge(image, ["a circle"])[0] == [True]
    with pytest.raises(ValueError, match="elephant"):
        world.judge(image, ["a red elephant"])


def test_evaluation_never_meets_training():
    """No prompt and no scene of the first 1,000 test indices occurs among the 32,768 that toy/build.py trains on."""
    train = [world.scene(i, "train") for i in range(32_768)]
    test = [world.scene(i, "test") for i in range(1000)]
    crowds = [world.crowd(i) for i in range(1000)]  # what VAE and SAM's encoder learn from has two objects at least
    assert min(len(s.objects) for s in crowds) == 2
    assert not {c for _, c in train} & {c for _, c in test}
    assert not {s.key() for s, _ in train} & {s.key() for s, _ in test}


def test_pipeline_loads_and_agrees_with_ours():
    """StableDiffusionXLPipeline on toy/sdxl draws what our sampler draws, guided, from the same noise."""
    _, prompts, _ = scenes(3)
    pipeline = StableDiffusionXLPipeline.from_pretrained("toy/sdxl", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generators = sample_generators(0, 0, range(3), "sample")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = (
            pipeline(
                prompts,
                num_inference_steps=20,
                guidance_scale=3.0,
                generator=generators,
                height=64,
                width=64,
                output_type="pt",
            ).images
            * 2
            - 1
        )
    encoder, vae = PromptEncoder("toy/sdxl", 64), load_vae("toy/sdxl")
    teacher = guided(load_denoiser("toy/sdxl"), encoder.null(), 3.0)
    ours = generate(teacher, encoder, vae, prompts, 20, 0, ode=True)
    assert (ours.clamp(-1, 1) - theirs).abs().mean() < 0.02


def test_frechet_and_recall_by_other_routes():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5])
    b = torch.randn(4000, 3, generator=generator, dtype=torch.float64) + 1
    # For axis-aligned Gaussians: sum of (m - n)² + (s - r)².
    assert metrics.frechet(a, b) == pytest.approx(3 + 0 + 1 + 0.25, rel=0.08)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    cluster = torch.cat([torch.randn(200, 2, generator=generator), torch.randn(200, 2, generator=generator) + 100])
    precision, recall = metrics.precision_recall(cluster[:200] + 0.01, cluster)
    assert precision > 0.95 and 0.45 < recall < 0.52  # one of two modes is missing


def test_saturation_contrast_diversity_by_hand():
    image = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)  # RGB 1, .5, 0
    assert metrics.saturation(image) == pytest.approx(1.0)
    assert metrics.contrast(image) == pytest.approx(0.0, abs=1e-6)
    half = torch.cat([-torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4)], 2)
    assert metrics.contrast(half) == pytest.approx(0.5, rel=0.05)  # luminances 0 and 1
    assert metrics.diversity(torch.cat([half, -half]), 2) == pytest.approx(1.0)


def test_clip_prefers_the_right_caption():
    images, captions, _ = scenes(64)
    clip = metrics.Clip("toy/clip")
    features = clip.features(images)
    assert clip.score(features, captions).mean() > clip.score(features, captions[1:] + captions[:1]).mean() + 0.1


def test_worse_pictures_of_the_reward_models_pairs():
    """One stated fact false, or all; the other kinds keep the scene and spoil the picture."""
    rng = np.random.default_rng(0)
    for i in range(20):
        scene, text = world.scene(i, "test")
        image, other = world.render(scene), world.render(world.scene(i + 1, "test")[0])
        worse = {kind: reward.spoilt(kind, scene, text, image, other, rng) for kind in reward.KINDS}
        for kind, false in (("fact", 1), ("facts", len(world.parse(text)))):
            (found,) = world.detect(worse[kind][None])
            assert list(world.check(found, text).values()).count(False) == false, (kind, text)
        for kind in ("blurred", "saturated", "mixed"):
            assert (
                worse[kind].shape == image.shape
                and worse[kind].abs().max() <= 1
                and (worse[kind] - image).abs().max() > 0.2
            )
        assert metrics.saturation(worse["saturated"][None]) > metrics.saturation(image[None])
