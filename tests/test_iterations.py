"""What a turn of train.py adds up: the gradients that a method's turn leaves, against the same written out by hand from the equations."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

import train
from diffusion import add_noise, rand, randn, sample_generators, times
from engine import config
from engine.networks import assemble
from siblings import advdmd, dmdr
from toy import world

PROMPTS = ["a large red circle", "a small blue ring"]
LAST = 3


def scene(*flags, prompts=PROMPTS, k=0):
    """A cast on the toy world whose LoRAs, where it has any, are not zero; and a micro-batch of `prompts` after k generator updates."""
    cast = assemble(config.parse([*flags, "--batch-size", str(len(prompts))]), 1, torch.device("cpu"))
    torch.manual_seed(0)
    for name, p in cast.fake.net.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.05)
    noise = {purpose: generators(purpose, len(prompts)) for purpose in ("rollout", "renoise", "fake", "unseen")}
    pictures = torch.stack([world.render(world.scene(i)[0]) for i in range(len(prompts))])
    window = train.window(cast.config, cast.vae, cast.latent.shape[-1], 1)
    return cast, train.Part(pictures, prompts, cast.encoder.encode(prompts), **noise, share=1.0, look_at=window, k=k)


def generators(purpose, n):
    return sample_generators(0, 1, range(n), purpose)


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def rolled(cast, c, i, noise):
    """Eq. 8 by hand: z at the noisiest step, then clean estimate and fresh noise, until it is at student step i."""
    x = randn(noise, cast.latent)
    with torch.no_grad():
        for j in range(i):
            x = add_noise(cast.G.schedule, cast.G(x, times(cast.S[j], x), c), times(cast.S[j + 1], x), randn(noise, x))
    return x


METHODS = {
    "pixel": (["--gan-weight", "0.5"], 0),
    "pixel-a": (["--gan-weight", "0.5", "--adv-reading", "a"], 0),
    "dmd2": (["--preset", "dmd2", "--gan-weight", "0.5"], 0),
    "cold start": (["--preset", "dmdr", "--dynamic", "4", "--reward-weight", "5"], 1),
    "reward": (["--preset", "dmdr", "--dynamic", "4", "--reward-weight", "5", "--reward-margin", "20"], 4),
    "clip reward": (["--preset", "dmdr", "--dynamic", "4", "--reward-weight", "5", "--reward", "clip", "--reward-margin", "1"], 4),
}


@pytest.mark.parametrize("method, i", [*((method, 1) for method in METHODS), ("pixel", LAST), ("pixel-a", LAST), ("reward", LAST)])
def test_generator_turn(method, i):
    """Eq. 4 with Eq. 5, Eq. 9 or DMDR's reward, by whichever the method has; what it leaves of Eq. 5 in the score estimator and head is nothing."""
    flags, k = METHODS[method]
    cast, part = scene(*flags, k=k)
    G, fake, S, c, schedule = cast.G, cast.fake, cast.S, part.c, cast.G.schedule
    train.generator_turn(cast, part, i, True)
    turns = gradient(G.net)
    assert cast.head is None or all(p.grad is None for p in [*cast.head.parameters(), *fake.net.parameters()])
    G.net.zero_grad()

    rollout, noise, cold = generators("rollout", 2), generators("renoise", 2), method == "cold start"
    x_i = rolled(cast, c, i, rollout)
    x = G(x_i, times(S[i], x_i), c)
    share = dmdr.renoise_share(noise, dmdr.c_at(k, 4)) if cold else rand(noise, x.device)
    t = schedule.t_at(0.02 + 0.96 * share)
    eps = randn(noise, x)
    with torch.no_grad():
        x_t = add_noise(schedule, x, t, eps)
        target = dmdr.real_score(fake, 0.75 * dmdr.c_at(k, 4)) if cold else cast.teacher
        null = {name: v if name == "size" else cast.null[name].expand_as(v) for name, v in c.items()}
        real = target(x_t, t, null) + 3 * (target(x_t, t, c) - target(x_t, t, null))
        towards = fake(x_t, t, c) - real
        towards /= (x - real).abs().mean((1, 2, 3), keepdim=True)
    L = 0.5 * (x - (x - towards).detach()).square().mean()
    if method == "dmd2":
        L = L + 0.5 * F.softplus(-cast.head(fake.with_features(add_noise(schedule, x, t, eps), t, c)[1])).mean()
    if method == "reward":
        s = times(S[2 if i == 1 else LAST], x)
        L = L + 5 * (20 - cast.R(add_noise(schedule, x, s, eps), s, cast.R.encoder.encode(PROMPTS))).clamp(min=0).mean()
    if method == "clip reward":
        L = L + 5 * (1 - cast.R.score(cast.R.features(cast.vae.decode(x)), PROMPTS)).clamp(min=0).mean()
    if method.startswith("pixel"):
        with torch.no_grad():
            x_3 = x_i
            if i == 1:
                x_2 = add_noise(schedule, x, times(S[2], x), randn(rollout, x))
                x_3 = add_noise(schedule, G(x_2, times(S[2], x), c), times(S[LAST], x), randn(rollout, x))
            if method == "pixel-a":
                x_3 = add_noise(schedule, G(x_3, times(S[LAST], x), c), times(S[LAST], x), randn(rollout, x))
        logits = cast.D(cast.D.features(cast.vae.decode(G(x_3, times(S[LAST], x), c))))
        L = L - 0.5 * logits.mean()
    L.backward()
    assert (turns - gradient(G.net)).norm() < 1e-3 * turns.norm()


def test_reinforcement_turn():
    """AdvDMD: minus the mean of A log π over rollouts and transitions, whose densities torch.distributions has; the end's A joins the last one's."""
    flags = ["--preset", "advdmd", "--rl-gate", "0", "--candidates", "4", "--gan-weight", "2"]
    cast, part = scene(*flags, prompts=[p for p in PROMPTS for _ in range(4)])
    G, S, c, n = cast.G, cast.S, part.c, 8
    part.states = advdmd.simulate(G, randn(part.rollout, cast.latent), c, S, part.rollout)
    part.x = part.states[-1]
    advdmd.reinforce(cast, part)
    turns = gradient(G.net)
    G.net.zero_grad()

    with torch.no_grad():
        ends = [*S[1:], torch.tensor(0)]
        R = torch.stack([cast.head(cast.fake.with_features(z, times(s, z), c)[1]) for z, s in zip(part.states[1:], ends, strict=True)], 1)
        groups = R.view(2, 4, 4)
        A = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(8, 4)
        A[:, 2] += A[:, 3]
    L, numbers = 0, cast.latent[0].numel()
    for i in range(3):
        s = times(S[i + 1], part.x)
        policy = Normal(G.schedule.alpha(s) * G(part.states[i], times(S[i], part.x), c), G.schedule.sigma(s).expand_as(part.x))
        L = L - (A[:, i] * policy.log_prob(part.states[i + 1]).flatten(1).sum(1)).sum() / (3 * n * numbers)
    (2 * L).backward()
    assert (turns - gradient(G.net)).norm() < 1e-3 * turns.norm()
