"""The policy of AdvDMD and DMDR's GRPO: its gradient against analytic ones, groups and their advantages."""

import pytest
import torch

import train
from diffusion import Schedule, sample_generators
from engine.batch import Batch
from engine.errors import UserError
from engine.run_folder import look
from siblings import policy


def test_gradient_of_a_scalar_gaussian_policy():
    """π = N(αθ, σ²), reward linear in z: A is (z - αθ)/σ, so d/dθ of -E[A log π] is -α/σ."""
    alpha, sigma, n = torch.tensor(0.6), torch.tensor(0.8), 40000
    theta = torch.tensor(0.3, requires_grad=True)
    z = (alpha * 0.3 + sigma * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0))).detach()
    A = policy.advantages(5.0 * z.flatten(1) - 2.0, n)[:, 0]
    x0 = theta.expand(n, 1, 1, 1)
    policy.loss(z, x0, alpha, sigma, A).backward()
    assert theta.grad.item() == pytest.approx(-(alpha / sigma).item(), rel=0.03)


def test_advantages_are_relative_to_the_group():
    R = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    A = policy.advantages(R, 4)
    torch.testing.assert_close(A.view(2, 4, 3).mean(1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    shifted = R + torch.tensor([10.0, -7.0]).repeat_interleave(4)[:, None]  # an easier prompt is no better picture
    torch.testing.assert_close(policy.advantages(shifted, 4), A, atol=1e-4, rtol=1e-4)
    assert policy.advantages(torch.ones(4, 2), 4).abs().max() == 0


def test_groups_share_a_prompt_and_not_their_noise():
    batch = Batch(torch.arange(8.0), list("abcdefgh"), {"pooled": torch.arange(8)}, list(range(8)), loop=1)
    grouped = policy.grouped(batch, 4)
    assert grouped.prompts == list("aaaaeeee") and grouped.x_real.tolist() == [0, 0, 0, 0, 4, 4, 4, 4]
    assert grouped.c["pooled"].tolist() == [0, 0, 0, 0, 4, 4, 4, 4] and grouped.samples == batch.samples
    with pytest.raises(ValueError, match="groups of 3"):
        policy.grouped(batch, 3)


class Linear:
    """G(z, t) = θ z: a rollout of linear Gaussians."""

    schedule = Schedule()

    def __init__(self, theta):
        self.theta = torch.tensor(theta, requires_grad=True)

    def __call__(self, z, t, c):
        return self.theta * z


@pytest.mark.parametrize("g, A", [(2, [0.5**0.5, -(0.5**0.5)]), (4, [-1.5, -0.5, 0.5, 1.5])])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_gradient_of_a_linear_gaussian_generator(K, g, A):
    """d/dθ log π(z_s|z_t) = α_s <z_s - α_s θ z_t, z_t>/σ_s², and A of two or four rewards: both in closed form.

    Two rewards differ by √2 of their standard deviation; 1, 2, 3, 4 have √(5/3). With one step there is no density.
    """
    G, S, B = Linear(0.7), Schedule().steps(K), 8
    generators = sample_generators(0, 1, range(B), "rollout")
    z = torch.randn(B, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    states = policy.simulate(G, z, None, S, generators)
    torch.testing.assert_close(states[-1], 0.7 * states[-2])  # the last step has no noise
    R = torch.tensor([5.0, -1.0] if g == 2 else [1.0, 2.0, 3.0, 4.0]).repeat(B // g)[:, None]
    A = torch.tensor(A).repeat(B // g) / (1 if g == 2 else (5 / 3) ** 0.5)
    loss = policy.reinforce(G, states, S, None, policy.advantages(R, g).expand(-1, K - 1), weight=3.0)
    if K == 1:
        assert loss == 0 and G.theta.grad is None
        return
    slope = value = 0.0
    for z_t, z_s, s in zip(states, states[1:], S[1:]):
        alpha, sigma = Schedule().alpha(s[None]), Schedule().sigma(s[None])
        error = z_s - alpha * 0.7 * z_t
        slope -= (A * (alpha * error * z_t / sigma**2).mean((1, 2, 3))).mean() / (K - 1)
        value -= (A * (-(error**2) / (2 * sigma**2)).mean((1, 2, 3))).mean() / (K - 1)
    assert G.theta.grad.item() == pytest.approx(3 * slope.item(), rel=1e-3)
    assert loss.item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("method", [["--method", "advdmd"], ["--method", "dmdr", "--rl", "grpo"]])
@pytest.mark.parametrize("flags", [["--batch-size", "4"], ["--batch-size", "12", "--micro-batch", "4"]])
def test_groups_that_do_not_fit_are_refused(flags, method):
    config = train.read([*method, "--candidates", "3", *flags])
    with pytest.raises(UserError, match="--candidates 3"):
        look(config)
