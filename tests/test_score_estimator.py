"""Eq. 6's minimiser and Eq. 11, elementwise. (Eq. 11 on sharded weights: test_train.py.)"""

import pytest
import torch

import score_estimator
from diffusion import Schedule

MEANS, STD, WEIGHTS = (-1.0, 1.5), 0.3, (0.3, 0.7)


def mixture(n, generator):
    which = (torch.rand(n, 1, 1, 1, generator=generator) < WEIGHTS[1]).float()
    return MEANS[0] + which * (MEANS[1] - MEANS[0]) + STD * torch.randn(n, 1, 1, 1, generator=generator)


def posterior_mean(schedule, x_t, t):
    """E[x_0 | x_t] of the two-component mixture, by Bayes."""
    a, s = schedule.alpha(t), schedule.sigma(t)
    v = a**2 * STD**2 + s**2
    log_p = torch.stack([torch.log(torch.tensor(w)) - (x_t - a * m) ** 2 / (2 * v) for m, w in zip(MEANS, WEIGHTS)])
    each = torch.stack([m + STD**2 * a / v * (x_t - a * m) for m in MEANS])
    return (log_p.softmax(0) * each).sum(0)


@pytest.mark.parametrize("schedule, t", [(Schedule("eps"), 400), (Schedule("eps"), 800), (Schedule("flow"), 500.0)])
def test_eq_6_is_minimal_at_the_posterior_mean(schedule, t):
    """For x̂_0 = posterior mean + Σ θ_k φ_k(x_t), the minimum over θ lies at 0, but for Monte-Carlo error."""
    n, generator = 200_000, torch.Generator().manual_seed(0)
    x, eps, times = mixture(n, generator), torch.randn(n, 1, 1, 1, generator=generator), torch.full((n,), t)

    def basis(x_t):
        return torch.cat([torch.ones_like(x_t), x_t, x_t**2, torch.sin(3 * x_t), torch.tanh(2 * x_t)], 1)

    def minimum(centre):
        def gradient(theta):
            theta.requires_grad_()

            def fake(x_t, t, c):
                return centre(x_t, t) + (basis(x_t) * theta.view(1, 5, 1, 1)).sum(1, keepdim=True)

            fake.schedule = schedule
            return torch.autograd.grad(score_estimator.loss(fake, x, times, eps, None), theta)[0]

        at_zero = gradient(torch.zeros(5))
        hessian = torch.stack([gradient(row.clone()) - at_zero for row in torch.eye(5)])
        return -torch.linalg.solve(hessian, at_zero)

    assert minimum(lambda x_t, t: posterior_mean(schedule, x_t, t)).abs().max() < 0.05
    assert minimum(lambda x_t, t: x_t).abs().max() > 0.3  # the test can fail: x_t itself is no minimiser


def test_eq_6_is_the_squared_error_of_eps():
    schedule = Schedule("eps")
    x, eps, eps_hat, t = *torch.randn(3, 4, 4, 8, 8), torch.tensor([50, 300, 600, 999])
    fake = lambda x_t, t, c: schedule.x_0(eps_hat, x_t, t)  # noqa: E731
    fake.schedule = schedule
    assert score_estimator.loss(fake, x, t, eps, None).item() == pytest.approx(
        (eps_hat - eps).square().mean().item(), rel=1e-3
    )


def test_eq_11_elementwise():
    theta, psi = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = [p.clone() for p in psi.parameters()]
    score_estimator.pull(psi.parameters(), theta.parameters(), 0.9)
    for p, b, q in zip(psi.parameters(), before, theta.parameters()):
        torch.testing.assert_close(p, 0.9 * b + 0.1 * q)
    before = [p.clone() for p in psi.parameters()]
    score_estimator.pull(psi.parameters(), theta.parameters(), 1.0)
    assert all(torch.equal(p, b) for p, b in zip(psi.parameters(), before))
