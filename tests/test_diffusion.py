"""Eq. 1, 2 and 8 against diffusers' own schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from diffusion import (
    Schedule,
    T,
    add_noise,
    backward_simulation,
    guided,
    randn,
    reverse_step,
    sample_generators,
    sample_ode,
    times,
)

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (3, 4, 8, 8)


def toy_denoiser(schedule):
    """A smooth made-up network: raw output(x_t, t), and the Denoiser that wraps it."""

    def raw(x_t, t):
        return torch.tanh(x_t * 0.7 + t.view(-1, 1, 1, 1) / 1000) + 0.1 * x_t

    def denoiser(x_t, t, c):
        return schedule.x_0(raw(x_t, t), x_t, t)

    denoiser.schedule = schedule
    return raw, denoiser


def start(seed=7):
    generators = sample_generators(seed, 0, range(SHAPE[0]), "test")
    return generators, randn(generators, torch.empty(SHAPE))


def test_student_steps():
    eps, flow = Schedule("eps"), Schedule("flow", shift=3.0)
    assert eps.steps(4).tolist() == [999, 749, 499, 249]
    assert eps.steps(8).tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    torch.testing.assert_close(flow.steps(4) / 1000, torch.tensor([1.0, 0.9, 0.75, 0.5]))


def test_student_steps_of_any_number_are_diffusers():
    """Also where they do not divide 1000: LCMScheduler's with as many original steps; SD3's for the card's sigmas."""
    lcm, euler = LCMScheduler(**SDXL), FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    for n in range(1, T + 1):
        lcm.set_timesteps(n, original_inference_steps=n)
        assert Schedule("eps").steps(n).tolist() == lcm.timesteps.tolist(), n
    for n in range(1, 33):
        euler.set_timesteps(sigmas=[i / n for i in range(n, 0, -1)])
        torch.testing.assert_close(Schedule("flow", shift=3.0).steps(n), euler.timesteps)
    ddim = DDIMScheduler(**SDXL, timestep_spacing="trailing")
    ddim.set_timesteps(30)
    assert Schedule("eps").sampler_steps(30).tolist() == ddim.timesteps.tolist()  # the teacher's are rounded


def test_amplitudes_follow_eq_1_step_by_step():
    """x_t built by 500 single steps of the paper's Eq. 1 has the amplitudes of the closed form."""
    schedule = Schedule("eps")
    betas = DDIMScheduler(**SDXL).betas.double()
    signal, variance = 1.0, 0.0
    for beta in betas[:500]:
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
    t = torch.tensor([499])
    assert schedule.alpha(t).item() == pytest.approx(float(signal), rel=1e-5)
    assert schedule.sigma(t).item() == pytest.approx(math.sqrt(variance), rel=1e-5)


def test_eq_1_and_x_0_conversion_match_diffusers():
    x_0, eps, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0, 500, 999])
    ours = add_noise(Schedule("eps"), x_0, t, eps)
    torch.testing.assert_close(ours, LCMScheduler(**SDXL).add_noise(x_0, eps, t), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Schedule("eps").x_0(eps, ours, t), x_0, atol=1e-4, rtol=1e-4)
    flow = Schedule("flow", shift=3.0)
    t = torch.tensor([1.0, 500.0, 1000.0])
    x_t = add_noise(flow, x_0, t, eps)
    torch.testing.assert_close(flow.x_0(eps - x_0, x_t, t), x_0, atol=1e-5, rtol=1e-5)  # v = eps - x_0


def test_weight_turns_x_0_error_into_the_networks_own():
    x_0, eps, guess = torch.randn(3, *SHAPE)
    v = Schedule("v")
    noisy = torch.tensor([10, 500, 999])
    for schedule, t, target in (
        (Schedule("eps"), torch.tensor([10, 500, 999]), eps),
        (Schedule("flow"), torch.tensor([50.0, 500.0, 999.0]), eps - x_0),
        (v, noisy, v.alpha(noisy) * eps - v.sigma(noisy) * x_0),
    ):
        x_t = add_noise(schedule, x_0, t, eps)
        torch.testing.assert_close(schedule.x_0(target, x_t, t), x_0, atol=1e-4, rtol=1e-4)
        through_x_0 = schedule.weight(t) * (schedule.x_0(guess, x_t, t) - x_0) ** 2
        torch.testing.assert_close(through_x_0, (guess - target) ** 2, atol=1e-3, rtol=1e-3)


def test_eq_2_is_ddim():
    schedule, scheduler = (
        Schedule("eps"),
        DDIMScheduler(**SDXL, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"),
    )
    raw, denoiser = toy_denoiser(schedule)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == schedule.sampler_steps(10).tolist()
    _, x = start()
    for t, s in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:]):
        ours = reverse_step(schedule, x, denoiser(x, times(t, x), None), times(t, x), times(s, x))
        x = scheduler.step(raw(x, times(t, x)), t, x).prev_sample
        torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_flow_sampler_is_euler():
    schedule, scheduler = Schedule("flow", shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    raw, denoiser = toy_denoiser(schedule)
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    _, z = start()
    x = z
    for t in scheduler.timesteps:
        x = scheduler.step(raw(x, times(t, x)), t, x).prev_sample
    torch.testing.assert_close(sample_ode(denoiser, z, None, 10), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_backward_simulation_is_the_lcm_scheduler(k):
    """Eq. 8's B from z to x_0 = diffusers' LCMScheduler with the same per-sample noise."""
    schedule, scheduler = Schedule("eps"), LCMScheduler(**SDXL, original_inference_steps=k, clip_sample=False)
    raw, denoiser = toy_denoiser(schedule)
    # The scheduler blends x_0 with x_t by consistency-model factors that are 1 and 0 at these steps to 1e-6.
    scheduler.set_timesteps(k)
    generators, z = start()
    ours = backward_simulation(denoiser, z, None, schedule.steps(k), generators)
    generators, x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(raw(x, times(t, x)), t, x, generator=generators).prev_sample
    assert scheduler.timesteps.tolist() == schedule.steps(k).tolist()
    torch.testing.assert_close(ours, x, atol=2e-3, rtol=1e-3)


def test_backward_simulation_is_stochastic_flow_matching():
    """The same for SD3: FlowMatchEulerDiscreteScheduler's stochastic_sampling draws from the global generator."""
    schedule, scheduler = (
        Schedule("flow", shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    )
    raw, denoiser = toy_denoiser(schedule)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(scheduler.timesteps, schedule.steps(4))
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = backward_simulation(denoiser, z, None, schedule.steps(4), [torch.Generator().manual_seed(3)])
    torch.manual_seed(3)
    x = z
    for t in scheduler.timesteps:
        x = scheduler.step(raw(x, times(t, x)), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_backward_simulation_in_two_parts_and_without_gradient():
    schedule = Schedule("eps")
    gain = torch.tensor(1.0, requires_grad=True)
    raw, _ = toy_denoiser(schedule)
    G = lambda x_t, t, c: gain * schedule.x_0(raw(x_t, t), x_t, t)  # noqa: E731
    G.schedule = schedule
    S = schedule.steps(4)
    generators, z = start()
    whole = backward_simulation(G, z, None, S, generators)
    generators, z = start()
    half = backward_simulation(G, z, None, S, generators, 0, 2)
    assert torch.equal(whole, backward_simulation(G, half, None, S, generators, 2))
    assert not whole.requires_grad


def test_guidance():
    """w = 1 is the conditional estimate, w = 0 the null prompt's; the estimate is linear in w."""
    denoiser = lambda x_t, t, c: x_t * c["tokens"].mean((1, 2)).view(-1, 1, 1, 1)  # noqa: E731
    denoiser.schedule = Schedule()
    x_t, t = torch.randn(SHAPE), torch.zeros(3).long()
    c, null = {"tokens": torch.full((3, 2, 2), 2.0)}, {"tokens": torch.full((1, 2, 2), 0.5)}
    torch.testing.assert_close(guided(denoiser, null, 0)(x_t, t, c), 0.5 * x_t)
    torch.testing.assert_close(guided(denoiser, null, 1)(x_t, t, c), 2 * x_t)
    torch.testing.assert_close(guided(denoiser, null, 3)(x_t, t, c), (0.5 + 3 * 1.5) * x_t)


@pytest.mark.parametrize("longer", [0, 1])
def test_guidance_pads_to_one_length(longer):
    """Prompt and null prompt of different lengths, with a mask: as if each had been given alone. Masks stay bool."""

    def denoiser(x_t, t, c):
        assert c["mask"].dtype == torch.bool
        mean = (c["tokens"] * c["mask"].unsqueeze(2)).sum((1, 2)) / c["mask"].sum(1)
        return x_t * (mean + c["pooled"].sum(1)).view(-1, 1, 1, 1)

    def condition(n, length):
        mask = torch.arange(length) < torch.tensor([[length], [2], [1]])[:n]
        return {"tokens": torch.randn(n, length, 4), "mask": mask, "pooled": torch.randn(n, 2)}

    denoiser.schedule = Schedule()
    x_t, t = torch.randn(SHAPE), torch.zeros(3).long()
    c, null = condition(3, (5, 3)[longer]), condition(1, (3, 5)[longer])
    apart = denoiser(x_t, t, {k: v.repeat(3, *[1] * (v.dim() - 1)) for k, v in null.items()})
    expected = apart + 4 * (denoiser(x_t, t, c) - apart)
    torch.testing.assert_close(guided(denoiser, null, 4)(x_t, t, c), expected)


def test_noise_belongs_to_the_sample():
    like = torch.empty(4, 4, 8, 8)
    whole = randn(sample_generators(5, 2, range(4), "rollout"), like)
    halves = [randn(sample_generators(5, 2, part, "rollout"), like[:2]) for part in (range(2), range(2, 4))]
    assert torch.equal(whole, torch.cat(halves))
    for other in (
        (6, 2, range(4), "rollout"),
        (5, 3, range(4), "rollout"),
        (5, 2, range(4), "fake"),
        (5, 2, range(1, 5), "rollout"),
    ):
        assert not torch.equal(whole, randn(sample_generators(*other), like))
