"""Eq. 3 and 4 on Gaussians, where scores and the KL divergence are known in closed form."""

import math

import pytest
import torch

import dmd
from diffusion import Schedule, add_noise

EPS, FLOW = Schedule("eps"), Schedule("flow", shift=3.0)
REAL, FAKE = (0.7, 0.5), (-0.4, 0.9)  # mean, standard deviation


def gaussian_denoiser(schedule, mean, std):
    """The exact E[x_0 | x_t] of data N(mean, std²)."""

    def denoiser(x_t, t, c):
        a, s = schedule.alpha(t), schedule.sigma(t)
        return mean + std**2 * a / (a**2 * std**2 + s**2) * (x_t - a * mean)

    denoiser.schedule = schedule
    return denoiser


def kl(schedule, t, fake, real):
    """KL(fake || real) of the two data Gaussians diffused to t, per dimension."""
    a, s = schedule.alpha(t).flatten().double(), schedule.sigma(t).flatten().double()
    mf, mr = a * fake[0], a * real[0]
    vf, vr = a**2 * fake[1] ** 2 + s**2, a**2 * real[1] ** 2 + s**2
    return (0.5 * (torch.log(vr / vf) + (vf + (mf - mr) ** 2) / vr - 1)).sum()


@pytest.mark.parametrize("schedule, t", [(EPS, 50), (EPS, 500), (EPS, 950), (FLOW, 300.0)])
def test_eq_3_is_the_score(schedule, t):
    """s(x_t) = d log p_t / dx_t, p_t = N(α m, α² σ² + σ_t²), by autograd of the log density."""
    t = torch.tensor([t])
    x_t = torch.randn(1, 4, 8, 8, requires_grad=True)
    a, s = schedule.alpha(t), schedule.sigma(t)
    variance = a**2 * REAL[1] ** 2 + s**2
    (expected,) = torch.autograd.grad((-((x_t - a * REAL[0]) ** 2) / (2 * variance)).sum(), x_t)
    x_0 = gaussian_denoiser(schedule, *REAL)(x_t, t, None)
    torch.testing.assert_close(dmd.score(x_t, x_0, a, s), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("schedule, t", [(EPS, 200), (EPS, 600), (FLOW, 500.0)])
def test_eq_4_is_the_gradient_of_the_kl(schedule, t):
    """α_t E[(s_fake - s_real) dG/dθ] = dKL/dθ for G(z) = m + σ z, θ = (m, σ).

    Monte Carlo against autograd of the closed form.
    """
    m, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in FAKE)
    expected = torch.autograd.grad(kl(schedule, torch.tensor([t]), (m, std), REAL), (m, std))

    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 512, 4, 16, 16, generator=generator)
    times = torch.full((512,), t)
    m, std = (torch.tensor(v, requires_grad=True) for v in FAKE)
    x = m + std * z
    teacher, fake = gaussian_denoiser(schedule, *REAL), gaussian_denoiser(schedule, *FAKE)
    difference, _ = dmd.score_difference(teacher, fake, x, times, eps, None)
    found = torch.autograd.grad((schedule.alpha(times) * difference * x).mean(), (m, std))
    for f, e in zip(found, expected):
        assert f.item() == pytest.approx(e.item(), rel=0.05)


def test_weight_makes_g_the_normalised_difference_of_estimates():
    teacher, fake = gaussian_denoiser(EPS, *REAL), gaussian_denoiser(EPS, *FAKE)
    x, eps, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([20, 250, 500, 750, 979])
    x_t = add_noise(EPS, x, t, eps)
    x0_real, x0_fake = teacher(x_t, t, None), fake(x_t, t, None)
    expected = (x0_fake - x0_real) / (x - x0_real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(dmd.gradient(teacher, fake, x, t, eps, None), expected, atol=1e-4, rtol=1e-4)


def test_loss_has_the_gradient_g_over_n():
    x, g = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    dmd.loss(x, g).backward()
    torch.testing.assert_close(x.grad, g / g.numel())


@pytest.mark.parametrize("broken", ["teacher", "fake", "x"])
def test_what_is_not_finite_stays_so(broken):
    """A NaN or an infinity of the teacher, of the fake or of x reaches g, in its own sample alone."""
    x = torch.randn(3, 4, 8, 8)
    nets = {"teacher": gaussian_denoiser(EPS, *REAL), "fake": gaussian_denoiser(EPS, *FAKE)}
    if broken == "x":
        x[1, 0, 0, 0] = math.nan
        x[2, 0, 0, 0] = math.inf
    else:
        nets[broken] = breaking(nets[broken])
    g = dmd.gradient(nets["teacher"], nets["fake"], x, torch.tensor([500] * 3), torch.randn_like(x), None)
    assert [bool(sample.isfinite().all()) for sample in g] == [True, False, False]
    assert not dmd.loss(x, g).isfinite()


def breaking(denoiser):
    """A denoiser whose second sample has a NaN and whose third has an infinity."""

    def x_0(x_t, t, c):
        out = denoiser(x_t, t, c)
        out[1, 0, 0, 0] = math.nan
        out[2, 0, 0, 0] = math.inf
        return out

    x_0.schedule = denoiser.schedule
    return x_0


def test_g_is_zero_where_x_is_the_teachers_estimate():
    """There Eq. 4's weight has no value."""
    teacher, fake = gaussian_denoiser(EPS, *REAL), gaussian_denoiser(EPS, *FAKE)
    zero = lambda x_t, t, c: teacher(x_t, t, c) * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)  # noqa: E731
    x = torch.randn(2, 4, 8, 8)
    x[1] = 0
    g = dmd.gradient(zero, fake, x, torch.tensor([500, 500]), torch.randn_like(x), None)
    assert g[0].abs().min() > 0 and g[1].abs().max() == 0


def test_steps_along_the_loss_lower_the_kl():
    """G(z) = m + σ z trained by the loss, its fake score kept exact, ends at the teacher's distribution."""
    m, std = (torch.tensor(v, requires_grad=True) for v in FAKE)
    optimizer, generator, seen = torch.optim.SGD([m, std], lr=0.3), torch.Generator().manual_seed(0), []
    for _ in range(60):
        z, eps = torch.randn(2, 64, 4, 8, 8, generator=generator)
        t = torch.randint(20, 980, (64,), generator=generator)
        seen.append(kl(EPS, torch.tensor([300]), (m.item(), std.item()), REAL).item())
        x = m + std * z
        fake = gaussian_denoiser(EPS, m.item(), std.item())
        optimizer.zero_grad()
        dmd.loss(x, dmd.gradient(gaussian_denoiser(EPS, *REAL), fake, x, t, eps, None)).backward()
        optimizer.step()
    assert seen[1] < seen[0] and seen[-1] < 0.02 * seen[0]
    assert m.item() == pytest.approx(REAL[0], abs=0.1) and std.item() == pytest.approx(REAL[1], abs=0.1)
