"""What an iteration adds up: the gradients that a method's loop gives each network, against the same by hand."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

import dmd
import train
from diffusion import add_noise, rand, randn, sample_generators, times
from engine.batch import Batch
from engine.networks import Networks, assemble
from siblings import advdmd, cold_start, policy
from toy import world

PROMPTS = ["a large red circle", "a small blue ring"]
LAST = -1


class Still(Networks):
    """Networks that do not move: `gradients` has what each optimizer would have taken."""

    def step(self, name, loss, max_norm=None):
        module = self.players[name][0]
        self.gradients[name] = gradient(module)
        module.zero_grad(set_to_none=True)
        return torch.zeros(()), False


def scene(*flags, prompts=PROMPTS, i=1, k=0):
    """-> still networks on the toy, a batch whose loop has student step i, iterate, and its n after k updates of G.

    LoRAs are not zero, as after some training.
    """
    config = train.read([*flags, "--batch-size", str(len(prompts))])
    prepare, iterate = train.method(config)
    made = assemble(config, 1, torch.device("cpu"), prepare)
    nets = Still(**{f.name: getattr(made, f.name) for f in fields(Networks)})
    nets.gradients = {}
    nets.denoisers = made.denoisers
    torch.manual_seed(0)
    for name, p in nets.fake.net.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.05)
    i %= len(nets.S)
    loop = next(n for n in range(1, 100) if dmd.student_step(nets.S, config.dm_steps, config.seed, n) == i)
    pictures = torch.stack([world.render(world.scene(j)[0]) for j in range(len(prompts))])
    batch = Batch(pictures, list(prompts), nets.encoder.encode(prompts), list(range(len(prompts))), loop)
    return nets, batch, iterate, (k + 1) * config.ttur


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def close(found, by_hand):
    return (found - by_hand).norm() < 1e-3 * by_hand.norm()


def rolled(nets, c, i, noise):
    """Eq. 8 by hand: z at the noisiest step, then clean estimate and fresh noise, until it is at student step i."""
    x = randn(noise, nets.latent)
    with torch.no_grad():
        for j in range(i):
            x_0 = nets.G(x, times(nets.S[j], x), c)
            x = add_noise(nets.G.schedule, x_0, times(nets.S[j + 1], x), randn(noise, x))
    return x


METHODS = {
    "pixel": (["--gan-weight", "0.5", "--dm-steps", "all"], 0),
    "pixel-a": (["--gan-weight", "0.5", "--dm-steps", "all", "--adv-reading", "a"], 0),
    "dmd2": (["--method", "dmd2", "--gan-weight", "0.5", "--critic-weight", "0.3"], 0),
    "cold start": (["--method", "dmdr", "--dynamic", "4", "--reward-weight", "5"], 1),
    "LoRA, cold start": (["--method", "dmdr", "--lora-rank", "4", "--dynamic", "4", "--reward-weight", "5"], 1),
    "reward": (["--method", "dmdr", "--dynamic", "4", "--reward-weight", "5", "--reward-margin", "20"], 4),
    "clip reward": (
        ["--method", "dmdr", "--dynamic", "4", "--reward-weight", "5", "--reward", "clip", "--reward-margin", "1"],
        4,
    ),
    "renoised": (["--method", "dmdr", "--dynamic", "4", "--reward-weight", "0", "--dm-input", "renoised"], 4),
}
ONE_STEP = {
    "pixel, one step": (["--gan-weight", "0.5", "--student-steps", "1"], 0),
    "reward, one step": ([*METHODS["reward"][0], "--student-steps", "1"], 4),
}
CASES = [*((method, 1) for method in METHODS), ("pixel", LAST), ("pixel-a", LAST), ("reward", LAST)]
CASES += [(method, LAST) for method in ONE_STEP]
METHODS |= ONE_STEP


@pytest.mark.parametrize("method, i", CASES)
def test_gradients_of_an_iteration(method, i):
    """G: Eq. 4, with Eq. 5, Eq. 9 or DMDR's reward where the method has it. The score estimator: Eq. 6 (DMD2: and 7).

    Nothing is left in it of Eq. 5, whose gradient reaches it as well.
    """
    flags, k = METHODS[method]
    nets, batch, iterate, n = scene(*flags, i=i, k=k)
    iterate(nets, batch, n)
    G, fake, D, S, c, schedule = nets.G, nets.fake, nets.D, nets.S, batch.c, nets.G.schedule
    generators = lambda purpose: sample_generators(0, batch.loop, range(2), purpose)  # noqa: E731

    rollout, noise, cold = generators("rollout"), generators("renoise"), method.endswith("cold start")
    x_i = rolled(nets, c, i % len(S), rollout)
    first = x = G(x_i, times(S[i], x_i), c)
    if method == "renoised":
        x = G(add_noise(schedule, first.detach(), times(S[i], x), randn(rollout, x)), times(S[i], x), c)
    u = cold_start.noise_level(noise, k, 4) if cold else rand(noise, x.device)
    t = schedule.t_at(0.02 + 0.96 * u)
    eps = randn(noise, x)
    with torch.no_grad():
        x_t = add_noise(schedule, x, t, eps)
        target = cold_start.real_score(fake, 0.75 * cold_start.c_at(k, 4)) if cold else nets.teacher
        null = {name: v if name == "size" else nets.null[name].expand_as(v) for name, v in c.items()}
        real = target(x_t, t, null) + 3 * (target(x_t, t, c) - target(x_t, t, null))
        towards = fake(x_t, t, c) - real
        towards /= (x - real).abs().mean((1, 2, 3), keepdim=True)
    L = 0.5 * (x - (x - towards).detach()).square().mean()
    logit = lambda y, t, eps: D(fake.with_features(add_noise(schedule, y, t, eps), t, c)[1])  # noqa: E731
    if method == "dmd2":
        L = L + 0.5 * F.softplus(-logit(x, t, eps)).mean()
    if method.startswith("reward"):
        s = times(torch.tensor(1) if "one step" in method else S[2 if i == 1 else LAST], x)
        scores = nets.R(add_noise(schedule, x, s, eps), s, nets.R.encoder.encode(PROMPTS))
        L = L + 5 * (20 - scores).clamp(min=0).mean()
    if method == "clip reward":
        L = L + 5 * (1 - nets.R.score(nets.R.features(nets.vae.decode(x)), PROMPTS)).clamp(min=0).mean()
    if method.startswith("pixel"):
        with torch.no_grad():
            x_3 = x_i
            if i == 1:
                x_2 = add_noise(schedule, x, times(S[2], x), randn(rollout, x))
                x_3 = add_noise(schedule, G(x_2, times(S[2], x), c), times(S[LAST], x), randn(rollout, x))
            if method == "pixel-a":
                x_3 = add_noise(schedule, G(x_3, times(S[LAST], x), c), times(S[LAST], x), randn(rollout, x))
        L = L - 0.5 * D(D.features(nets.vae.decode(G(x_3, times(S[LAST], x), c)))).mean()
    L.backward()
    assert close(nets.gradients["G"], gradient(G.net))

    fake.net.zero_grad()
    noise, x = generators("fake"), first.detach()
    t = schedule.t_at(rand(noise) if not cold else cold_start.noise_level(noise, k, 4))
    eps = randn(noise, x)
    x_t = add_noise(schedule, x, t, eps)
    eps_hat = (x_t - schedule.alpha(t) * fake(x_t, t, c)) / schedule.sigma(t)
    L = (eps_hat - eps).square().mean()
    if method == "dmd2":
        latent = nets.vae.encode(batch.x_real)
        L = L + 0.3 * (F.softplus(-logit(latent, t, eps)) + F.softplus(logit(x, t, eps))).mean()
    L.backward()
    assert close(nets.gradients["fake"], gradient(fake.net))


def test_gradients_of_reinforcement():
    """AdvDMD: minus the mean of A log π over rollouts and transitions, by the densities of torch.distributions.

    The end's A joins the last transition's.
    """
    flags = ["--method", "advdmd", "--rl-gate", "0", "--candidates", "4", "--gan-weight", "2"]
    nets, batch, *_ = scene(*flags, prompts=[p for p in PROMPTS for _ in range(4)])
    G, S, c = nets.G, nets.S, batch.c
    rollout = batch.generators("rollout")
    states = policy.simulate(G, randn(rollout, nets.latent), c, S, rollout)
    advdmd.reinforce(nets, batch, states)
    found = gradient(G.net)
    G.net.zero_grad()

    with torch.no_grad():
        ends = [*S[1:], torch.tensor(0)]
        seen = zip(states[1:], ends, strict=True)
        R = torch.stack([nets.D(nets.fake.with_features(z, times(s, z), c)[1]) for z, s in seen], 1)
        groups = R.view(2, 4, 4)
        A = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(8, 4)
        A[:, 2] += A[:, 3]
    (2 * by_density(nets, states, A, c)).backward()
    assert close(found, gradient(G.net))


def by_density(nets, states, A, c):
    """-E [A log π], a mean over samples, transitions and numbers, by the densities of torch.distributions."""
    G, S = nets.G, nets.S
    L = 0
    for i in range(3):
        s = times(S[i + 1], states[0])
        mean = G.schedule.alpha(s) * G(states[i], times(S[i], states[0]), c)
        normal = Normal(mean, G.schedule.sigma(s).expand_as(mean))
        L = L - (A[:, i] * normal.log_prob(states[i + 1]).flatten(1).mean(1)).mean() / 3
    return L


def test_gradients_of_grpo():
    """DMDR: what the reward adds to an iteration's gradient is w times that of -E [A log π], A from the end's reward.

    The score estimator sees the same x with and without.
    """
    flags = ["--method", "dmdr", "--dynamic", "0", "--rl", "grpo", "--candidates", "4", "--reward-weight", "2"]
    nets, batch, iterate, n = scene(*flags, prompts=[p for p in PROMPTS for _ in range(4)])
    found = []
    for nets.config.reward_weight in (2, 0):
        iterate(nets, batch, n)
        found.append(nets.gradients.copy())
    rollout = batch.generators("rollout")
    states = policy.simulate(nets.G, randn(rollout, nets.latent), batch.c, nets.S, rollout)
    groups = nets.R.score_finished(states[-1], batch.prompts).view(2, 4)
    A = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(8, 1).expand(8, 3)
    (2 * by_density(nets, states, A, batch.c)).backward()
    assert close(found[0]["G"] - found[1]["G"], gradient(nets.G.net))
    assert torch.equal(found[0]["fake"], found[1]["fake"])
