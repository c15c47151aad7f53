"""Eq. 5 and 7, DMD2's adversarial pair: finite differences, which weights learn, the optimal logit; --preset dmd2."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmd
import train
from diffusion import add_noise
from engine.errors import UserError
from engine.models import load_denoiser
from engine.networks import assemble
from engine.prompts import PromptEncoder, load_encoder
from siblings import dmd2


@pytest.fixture(scope="module")
def scene():
    """The toy's UNet in double precision, a head, latents, and a condition."""
    fake = load_denoiser("toy/sdxl", dtype=torch.float64)
    fake.net.double()
    torch.manual_seed(0)
    head = dmd2.Head(fake.net.config.block_out_channels[-1], 4).double()
    c = {k: v.double() for k, v in PromptEncoder("toy/sdxl", 64).encode(["a red circle", "a blue ring"]).items()}
    generator = torch.Generator().manual_seed(1)
    x, x_real, eps = torch.randn(3, 2, 4, 16, 16, generator=generator, dtype=torch.float64).unbind()
    return fake, head, x, x_real, torch.tensor([200, 700]), eps, c


def test_features_are_what_the_mid_block_gives(scene):
    """Against the UNet's own blocks called one by one; and the estimate is the plain call's."""
    fake, _, x, _, t, _, c = scene
    x_0, features = fake.with_features(x, t, c)
    unet, added = fake.net, {"text_embeds": c["pooled"], "time_ids": c["size"]}
    emb = unet.time_embedding(unet.get_time_embed(x, t))
    emb = emb + unet.get_aug_embed(emb, c["tokens"], added)
    h = unet.conv_in(x)
    for block in unet.down_blocks:
        h, _ = (
            block(h, emb, encoder_hidden_states=c["tokens"])
            if getattr(block, "has_cross_attention", False)
            else block(h, emb)
        )
    torch.testing.assert_close(features, unet.mid_block(h, emb, encoder_hidden_states=c["tokens"]))
    assert torch.equal(x_0, fake(x, t, c)) and not fake.net.mid_block._forward_hooks


def test_features_of_a_transformer_are_its_middle_blocks_tokens():
    """toy/sd3: after 3 of 6 blocks called one by one, as a map row by row; recomputed in the backward pass as well."""
    fake = load_denoiser("toy/sd3", dtype=torch.float64)
    net = fake.net.double().train()
    c = {k: v.double() for k, v in load_encoder("toy/sd3", 64).encode(["a red circle", "a blue ring"]).items()}
    x, t = torch.randn(2, 4, 16, 16, dtype=torch.float64), torch.tensor([200.0, 700.0])
    h, text, emb = net.pos_embed(x), net.context_embedder(c["tokens"]), net.time_text_embed(t, c["pooled"])
    for block in net.transformer_blocks[:3]:
        text, h = block(hidden_states=h, encoder_hidden_states=text, temb=emb)
    grads = [torch.autograd.grad(h.square().mean(), net.pos_embed.proj.weight)[0]]
    net.enable_gradient_checkpointing()
    x_0, features = fake.with_features(x, t, c)
    assert features.shape == (2, 96, 8, 8)
    for i in range(8):
        torch.testing.assert_close(features[:, :, i], h[:, 8 * i : 8 * (i + 1)].transpose(1, 2))
    features.square().mean().backward()
    torch.testing.assert_close(net.pos_embed.proj.weight.grad, grads[0])
    assert all(p.grad is None for p in net.transformer_blocks[3:].parameters())
    assert torch.equal(x_0, fake(x, t, c)) and not net.transformer_blocks[2]._forward_hooks


def test_heads():
    """Scaled: on the toy's 4 x 4 its own layers, bit for bit; one halving more for each doubling of the map.

    Map: the mean of the logits that each 3 x 3 positions give. Published: by hand from its layers, at SDXL's width as
    many weights as they have; for its own maps alone.
    """
    torch.manual_seed(0)
    by_hand = []
    for _ in range(2):
        by_hand += [nn.Conv2d(96, 96, 3, 2, 1), nn.GroupNorm(8, 96), nn.SiLU()]
    by_hand = nn.Sequential(*by_hand, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 1)).state_dict()
    torch.manual_seed(0)
    found = dmd2.Head(96, 4).net.state_dict()
    assert found.keys() == by_hand.keys() and all(torch.equal(found[k], by_hand[k]) for k in found)
    halvings = {side: sum(isinstance(m, nn.Conv2d) for m in dmd2.Head(8, side).net) for side in (8, 12, 32, 64)}
    assert halvings == {8: 3, 12: 4, 32: 5, 64: 6} and dmd2.Head(8, 12)(torch.zeros(2, 8, 12, 12)).shape == (2,)

    head, h = dmd2.Head(8, 5, "map"), torch.randn(2, 8, 5, 5)
    local = nn.Sequential(*head.net[:4])(h)
    assert local.shape == (2, 1, 5, 5)
    torch.testing.assert_close(head(h), local.mean((1, 2, 3)))

    head, h = dmd2.Head(32, 32, "published"), torch.randn(2, 32, 32, 32)
    weights = list(head.parameters())
    logit = head(h)
    for i, (stride, padding) in enumerate(((2, 1), (2, 1), (2, 1), (4, 0))):
        w, b, scale, shift = weights[4 * i : 4 * i + 4]
        assert w.shape == (32, 32, 4, 4)
        h = F.silu(F.group_norm(F.conv2d(h, w, b, stride, padding), 32, scale, shift))
    torch.testing.assert_close(logit, (h.flatten(1) @ weights[-2].flatten() + weights[-1]))
    with torch.device("meta"):
        sdxl = dmd2.Head(1280, 32, train.read(["--preset", "sdxl-dmd2"]).head)
    assert sum(p.numel() for p in sdxl.parameters()) == 4 * (16 * 1280**2 + 3 * 1280) + 1281
    with pytest.raises(UserError, match="^--head published is for maps of 32 x 32, .* 96 x 4 x 4: use --head scaled$"):
        assemble(train.read(["--preset", "dmd2", "--head", "published"]), 1, torch.device("cpu"), dmd2.prepare)


@pytest.mark.parametrize("model", ["toy/sdxl", "toy/sd3"])
def test_features_of_the_last_block(model):
    """What the network's own last layers turn into its output; the head fits them."""
    config = train.read(
        ["--preset", "dmd2", "--model", model, "--batch-size", "2", "--head", "map", "--d-block", "last"]
    )
    nets = assemble(config, 1, torch.device("cpu"), dmd2.prepare)
    net, x, t = nets.fake.net, torch.randn(2, 4, 16, 16), torch.tensor([200, 700])
    c = nets.encoder.encode(["a red circle", "a blue ring"])
    inputs = []
    handle = (net.conv_norm_out if model == "toy/sdxl" else net.norm_out).register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    _, features = nets.fake.with_features(x, t, c)
    handle.remove()
    last = inputs[0] if model == "toy/sdxl" else inputs[0].transpose(1, 2).unflatten(2, (8, 8))
    assert torch.equal(features, last) and nets.D(features).shape == (2,)


def test_eq_5_against_finite_differences(scene):
    fake, head, x, _, t, eps, c = scene
    x = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(dmd2.generator_loss(fake, head, x, t, eps, c), x)
    direction, h = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1e-5
    with torch.no_grad():
        up, down = (dmd2.generator_loss(fake, head, x + s * h * direction, t, eps, c) for s in (1, -1))
    assert ((up - down) / (2 * h)).item() == pytest.approx((slope * direction).sum().item(), rel=1e-4)
    with torch.no_grad():  # a step along it makes D call x more real
        logits = lambda x: head(fake.with_features(add_noise(fake.schedule, x, t, eps), t, c)[1])  # noqa: E731
        assert logits(x - slope / slope.norm()).mean() > logits(x).mean()


def test_eq_7_reaches_psi_and_the_head(scene):
    """The score estimator's down and mid blocks and the head learn from it; its up blocks, which D lacks, do not."""
    fake, head, x, x_real, t, eps, c = scene
    loss, right = dmd2.discriminator_loss(fake, head, x, x_real, t, eps, c)
    loss.backward()
    assert all(p.grad is not None for p in head.parameters())
    assert fake.net.conv_in.weight.grad.abs().max() > 0 and all(p.grad is None for p in fake.net.up_blocks.parameters())
    fake.net.zero_grad(), head.zero_grad()
    always_real = lambda features: torch.ones(len(features))  # noqa: E731
    assert dmd2.discriminator_loss(fake, always_real, x, x_real, t, eps, c)[1] == 0.5


def test_optimal_logit_is_log_p_over_q():
    """Two latents, real with p and made with q: the head that minimises Eq. 7 gives log p/q at each."""
    p, q = torch.tensor([0.8, 0.2]), torch.tensor([0.3, 0.7])
    logits = torch.zeros(2, requires_grad=True)

    class Fake:
        schedule = type("S", (), {"alpha": staticmethod(lambda t: 1.0), "sigma": staticmethod(lambda t: 0.0)})

        def with_features(self, x_t, t, c):
            return None, x_t

    one, zero = torch.eye(2).split(1), torch.zeros(1, 2)
    pairs = [(a, b) for a in range(2) for b in range(2)]
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def expected_loss():
        head = lambda y: y @ logits  # noqa: E731
        terms = [
            dmd2.discriminator_loss(Fake(), head, one[b], one[a], 0, zero, None)[0] * p[a] * q[b] for a, b in pairs
        ]
        optimizer.zero_grad()
        sum(terms).backward()
        return sum(terms)

    optimizer.step(expected_loss)
    torch.testing.assert_close(logits.detach(), (p / q).log(), atol=1e-3, rtol=0)


def test_preset_dmd2_counts_its_passes(small_toys, tmp_path):
    """Samples: batch x loops, as the paper counts; passes of the UNets by hand, one with gradient as 3."""
    flags = "--preset dmd2 --iterations 6 --save-every 5 --batch-size 4 --preview-every 0 --log-every 100".split()
    run = train.train(train.read([*flags, "--model", small_toys["sdxl"], "--out", str(tmp_path / "run")]))
    progress = json.loads((run / "checkpoint-000005" / "progress.json").read_text())
    steps = [dmd.student_step(range(4), "all", 0, loop) for loop in range(1, 6)]
    rollout = sum(steps)
    without_G = 1  # x
    with_G = 3 + 2 + 1 + 3  # x with gradient, the guided teacher, the fake's score, Eq. 5
    fake = 3 + 2 * 3  # Eq. 6, and Eq. 7 on real and made
    assert progress["samples"] == 20  # loop 6 alone is watched: its health signals cost passes too
    assert progress["passes"] == 4 * (rollout + 4 * without_G + with_G + 5 * fake)


def test_preset_dmd2_trains_its_networks(small_toys, tmp_path):
    """TTUR 5: G moves in loop 5, by both terms. Eq. 5 leaves the score estimator alone. --resume keeps the method."""
    flags = ["--preset", "dmd2", "--iterations", "5", "--batch-size", "4", "--preview-every", "0", "--log-every", "1"]
    flags += ["--model", small_toys["sdxl"]]
    last = {}
    for weight in ("0.005", "50"):
        run = train.train(train.read([*flags, "--gan-weight", weight, "--out", str(tmp_path / weight)]))
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [m["loops"] for m in logged if "dm_loss" in m and "adv_loss" in m] == [5]
        assert logged[-1]["generator_updates"] == 1
        assert all("d_loss" in m and "d_accuracy" in m for m in logged)
        last[weight] = logged[-1]
    assert last["50"]["g_norm"] > 2 * last["0.005"]["g_norm"]
    for key in ("fake_loss", "fake_norm", "d_loss"):
        assert last["50"][key] == pytest.approx(last["0.005"][key], rel=1e-5)
    with pytest.raises(UserError, match="--method dmd2"):
        train.train(train.read([*flags, "--out", str(tmp_path / "50"), "--resume", "--method", "flash"]))
