"""Eq. 9 and 10 on the real SAM encoder, VAE and heads of the toy."""

import math

import pytest
import torch

import pixel_gan
from diffusion import Schedule, sample_generators
from engine.config import Config
from engine.models import at_once, load_sam, load_vae
from toy import world


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return pixel_gan.PixelDiscriminator(load_sam("toy/sam")), load_vae("toy/sdxl")


def images(n, start=0):
    return torch.stack([world.render(world.scene(i)[0]) for i in range(start, start + n)])


@pytest.mark.parametrize("kind", ["hinge", "logistic"])
def test_eq_9_gradient_reaches_G_and_nothing_else(parts, kind):
    D, vae = parts
    theta = torch.ones(1, 4, 1, 1, requires_grad=True)  # a generator: x_adv = theta * x̂
    x_hat = vae.encode(images(2)).requires_grad_()  # Eq. 8 detaches it
    D.requires_grad_(False)
    pixel_gan.generator_loss(D(D.features(vae.decode(theta * x_hat.detach()))), kind).backward()
    D.requires_grad_(True)
    assert theta.grad.abs().min() > 0
    assert x_hat.grad is None
    frozen = [*D.encoder[0].parameters(), *vae.parameters(), *D.parameters()]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("kind", ["hinge", "logistic"])
def test_eq_10_gradient_reaches_the_heads_and_nothing_else(parts, kind):
    D, vae = parts
    x_adv = vae.encode(images(2)).requires_grad_()
    features = [f.detach() for f in D.features(vae.decode(x_adv))]
    pixel_gan.discriminator_loss(D(D.features(images(2, 10))), D(features), kind).backward()
    assert x_adv.grad is None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in D.named_parameters() if "bias" not in name)
    assert all(p.grad is None for p in [*D.encoder[0].parameters(), *vae.parameters()])
    D.zero_grad()


def test_eq_9_gradient_against_finite_differences():
    """d/dx of the generator's loss through heads, SAM and VAE, in double precision."""
    torch.manual_seed(0)
    D, vae = pixel_gan.PixelDiscriminator(load_sam("toy/sam").double()).double().eval(), load_vae("toy/sdxl").double()
    x = vae.encode(images(1).double()).requires_grad_()
    loss = lambda x: pixel_gan.generator_loss(D(D.features(vae.decode(x))), "logistic")  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(x), x)
    direction, h = torch.randn_like(x), 1e-5
    with torch.no_grad():
        difference = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-5)


def test_a_step_along_eq_9_raises_D(parts):
    D, vae = parts
    x = vae.encode(images(4)).requires_grad_()
    logits = D.eval()(D.features(vae.decode(x)))
    (gradient,) = torch.autograd.grad(pixel_gan.generator_loss(logits, "logistic"), x)
    with torch.no_grad():
        after = D(D.features(vae.decode(x - 0.5 * gradient / gradient.abs().max())))
    D.train()
    assert after.mean() > logits.mean()


def test_eq_10_optimum_on_two_points():
    """Reals take the points with probabilities p, fakes with q: the best logistic logit is log p/q."""
    p, q = (0.8, 0.2), (0.3, 0.7)
    reals, fakes = torch.tensor([0] * 8 + [1] * 2), torch.tensor([0] * 3 + [1] * 7)
    logit = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([logit], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = pixel_gan.discriminator_loss(logit[reals][:, None], logit[fakes][:, None], "logistic")
        loss.backward()
        return loss

    optimizer.step(closure)
    for i in range(2):
        assert logit[i].item() == pytest.approx(math.log(p[i] / q[i]), abs=1e-3)


def test_hinge_by_hand():
    real, fake = torch.tensor([[2.0], [0.5]]), torch.tensor([[-3.0], [0.25]])
    assert pixel_gan.discriminator_loss(real, fake).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1.25) / 2)
    assert pixel_gan.generator_loss(fake).item() == pytest.approx(1.375)
    assert pixel_gan.accuracy(real, fake).item() == pytest.approx(0.75)


def test_features_are_segment_anythings_own(parts):
    """The last level is what ImageEncoderViT.forward returns; there is a level per global-attention block besides."""
    D, _ = parts
    x = images(2)
    features = D.features(x)
    torch.testing.assert_close(features[-1], D.encoder[0](pixel_gan.sam_input(x, 64)))
    assert len(features) == 1 + sum(block.window_size == 0 for block in D.encoder[0].blocks)


def test_heads_learn_to_tell_real_from_blurred(parts):
    """Trained on the features of 256 scenes, they tell 128 others from their blurred copies."""
    torch.manual_seed(0)
    D = pixel_gan.PixelDiscriminator(parts[0].encoder[0])
    optimizer = torch.optim.Adam(D.parameters(), lr=Config.d_lr)
    blur = lambda x: torch.nn.functional.avg_pool2d(x, 5, 1, 2)  # noqa: E731
    with torch.no_grad():  # SAM is frozen: its features are the same at every step
        real, blurred = ([D.features(y) for y in batches] for batches in scenes(16, blur))
        unseen = images(128, 5000)
        held_out = D.features(unseen), D.features(blur(unseen))
    for step in range(150):
        optimizer.zero_grad()
        pixel_gan.discriminator_loss(D(real[step % 16]), D(blurred[step % 16])).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = pixel_gan.accuracy(*map(D, held_out))
    assert accuracy > 0.9


def scenes(batches, change):
    """`batches` batches of 16 scenes, and the same changed."""
    real = [images(16, 16 * i) for i in range(batches)]
    return real, [change(x) for x in real]


def test_sam_in_bf16():
    """Kept in bf16, as on a GPU, it gives fp32 features and gradients, within 2 % and 10 % of an fp32 encoder's."""
    images, features, grads = torch.rand(2, 3, 64, 64) * 2 - 1, [], []
    for dtype in (torch.float32, torch.bfloat16):
        x = images.clone().requires_grad_()
        D = pixel_gan.PixelDiscriminator(load_sam("toy/sam", dtype=dtype))
        features.append(D.features(x))
        sum(f.square().mean() for f in features[-1]).backward()
        grads.append(x.grad)
    assert all(f.dtype == torch.float32 for f in features[1]) and grads[1].dtype == torch.float32
    for (a, b), most in [(pair, 0.02) for pair in zip(*features)] + [(grads, 0.1)]:
        assert 0 < (a - b).norm() < most * a.norm()


def test_vae_takes_a_few_pictures_at_a_time(parts, monkeypatch):
    """Without gradient 64 of the toy's pictures, or 4 of 1024 pixels; the pictures are the same."""
    vae, kept, z = parts[1], [], torch.randn(70, 4, 16, 16)
    encode, decode = vae.net.encode, vae.net.decode
    monkeypatch.setattr(vae.net, "encode", lambda images: kept.append(len(images)) or encode(images))
    monkeypatch.setattr(vae.net, "decode", lambda z, **how: kept.append(len(z)) or decode(z, **how))
    with torch.no_grad():
        pictures = vae.decode(z)
    latents = vae.encode(pictures)
    vae.decode(z.requires_grad_())  # with gradient all at once
    assert kept == [64, 6, 64, 6, 70] and at_once(1024) == 4
    assert torch.allclose(pictures[66], vae.decode(z[66:67])[0], atol=1e-5) and torch.allclose(
        latents[66], vae.encode(pictures[66:67])[0], atol=1e-5
    )


def test_the_square_that_D_sees():
    """The same square of latents and pixels, anew in every loop, and inside the picture; everything without a crop."""
    latents = torch.arange(16.0).view(1, 1, 1, 16).expand(2, 4, 16, 16) + 100 * torch.arange(16.0).view(1, 1, 16, 1)
    pixels = latents.repeat_interleave(4, 2).repeat_interleave(4, 3)
    corners = set()
    for loop in range(1, 30):
        seen, seen_pixels = pixel_gan.window(24, latents, 4, seed=0, loop=loop)
        square = latents[seen]
        assert square.shape == (2, 4, 6, 6)
        assert torch.equal(square.repeat_interleave(4, 2).repeat_interleave(4, 3), pixels[seen_pixels])
        corners.add(square[0, 0, 0, 0].item())
    assert len(corners) > 10
    seen, seen_pixels = pixel_gan.window(0, latents, 4, seed=0, loop=1)
    assert torch.equal(latents[seen], latents) and torch.equal(pixels[seen_pixels], pixels)


@pytest.mark.parametrize("i", range(4))
def test_readings_of_the_last_input(i):
    """From student step i on, by hand: b is the rollout's own last input, a its end noised to the last step again."""
    schedule = Schedule()
    S, last = schedule.steps(4), 3

    def G(x_t, t, c):
        return 0.5 * x_t + 0.1

    G.schedule = schedule
    x_tau = torch.randn(2, 4, 8, 8)
    found = {}
    for reading in "ab":
        generators = sample_generators(0, 1, range(2), "rollout")
        found[reading] = pixel_gan.last_input(G, x_tau, G(x_tau, None, None), None, S, i, generators, reading)
    generators = sample_generators(0, 1, range(2), "rollout")

    def noised(x_0, step):
        t = S[step].expand(2)
        noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
        return schedule.alpha(t) * x_0 + schedule.sigma(t) * noise

    x_t = x_tau
    for step in range(i, last):
        x_t = noised(0.5 * x_t + 0.1, step + 1)
    torch.testing.assert_close(found["b"], x_t)
    torch.testing.assert_close(found["a"], noised(0.5 * x_t + 0.1, last))
    assert i < last or found["b"] is x_tau  # so that x_adv is x, as of a one-step student
