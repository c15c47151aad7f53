"""AdvDMD: the group-relative gradient against an analytic policy gradient, the clip, which states have a likelihood, and the gate."""

import json

import pytest
import torch

import train
from diffusion import Schedule, add_noise
from engine import checkpoint, config, run_folder
from engine.networks import assemble
from siblings import advdmd, dmd2


def test_gradient_of_a_scalar_gaussian_policy():
    """π = N(αθ, σ²), reward linear in z: A is (z - αθ)/σ, so d/dθ of -E[A log π] is -α/σ."""
    alpha, sigma, n = torch.tensor(0.6), torch.tensor(0.8), 40000
    theta = torch.tensor(0.3, requires_grad=True)
    z = (alpha * 0.3 + sigma * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0))).detach()
    A = advdmd.advantages(5.0 * z.flatten(1) - 2.0, n)[:, 0]
    x0 = theta.expand(n, 1, 1, 1)
    advdmd.loss(z, x0, x0.detach(), alpha, sigma, A).backward()
    assert theta.grad.item() == pytest.approx(-(alpha / sigma).item(), rel=0.03)


def test_advantages_are_relative_to_the_group():
    R = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    A = advdmd.advantages(R, 4)
    torch.testing.assert_close(A.view(2, 4, 3).mean(1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    shifted = R + torch.tensor([10.0, -7.0]).repeat_interleave(4)[:, None]  # an easier prompt is no better picture
    torch.testing.assert_close(advdmd.advantages(shifted, 4), A, atol=1e-4, rtol=1e-4)
    assert advdmd.advantages(torch.ones(4, 2), 4).abs().max() == 0


@pytest.mark.parametrize("A, toward, moves", [(1.0, True, False), (1.0, False, True), (-1.0, True, True), (-1.0, False, False)])
def test_clip_stops_what_has_gone_far_enough(A, toward, moves):
    """A policy already moved past 1 ± ε in the direction that its advantage asks for gets no further gradient."""
    z_s, x_old = torch.full((1, 1, 2, 2), 2.0), torch.zeros(1, 1, 2, 2)
    x = torch.full((1, 1, 2, 2), 0.5 if toward else -0.5, requires_grad=True)
    one = torch.tensor(1.0)
    advdmd.loss(z_s, x, x_old, one, one, torch.tensor([A])).backward()
    assert (x.grad.abs().max() > 0) == moves


def test_last_transition_has_no_likelihood():
    """Of K states that are judged, K - 1 transitions have a density; the end's advantage goes to the last of them."""
    A = torch.tensor([[1.0, 2.0, 3.0, 10.0]])
    assert advdmd.credit(A).tolist() == [[1.0, 2.0, 13.0]]
    S = Schedule().steps(4)
    assert [int(t) for t in torch.stack(advdmd.levels(S, torch.zeros(1, 1, 1, 1))).flatten()] == [749, 499, 249, 0]


def test_discriminator_on_states():
    """By hand: -log D of reals, -log(1 - D) of states; who is right; reals come first, noised to each state's level, the clean end not at all."""
    real, made = torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0, 3.0]])
    by_hand = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(made)).log().mean())
    torch.testing.assert_close(advdmd.discriminator_loss(real, made), by_hand)
    assert advdmd.accuracy(real, made) == 0.75 and advdmd.accuracy(-real, -made) == 0.25

    class Fake:
        schedule = Schedule()

        def with_features(self, z, t, c):
            return None, z

    S, (z, z_1, z_2, x_0, x_real, eps) = Schedule().steps(3), torch.randn(6, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    reals, states = advdmd.judged(Fake(), lambda z: z.flatten(), [z, z_1, z_2, x_0], x_real, S, eps, None)
    torch.testing.assert_close(states, torch.stack([z_1, z_2, x_0], 1).flatten(1))
    noised = [add_noise(Fake.schedule, x_real, t.expand(2), eps) for t in S[1:]]
    torch.testing.assert_close(reals, torch.stack([*noised, x_real], 1).flatten(1))


def test_groups_share_a_prompt():
    assert advdmd.spread(list("abcdefgh"), 4) == list("aaaaeeee")
    assert advdmd.spread(torch.arange(4), 2).tolist() == [0, 0, 2, 2]
    with pytest.raises(ValueError, match="groups of 3"):
        advdmd.spread(list("abcd"), 3)


def test_groups_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(train.UserError, match="--candidates 3"):
        train.train(config.parse(["--preset", "advdmd", "--candidates", "3", "--batch-size", "4", "--out", str(tmp_path / "run")]))


def run(tmp_path, name, *flags):
    common = "--preset advdmd --ttur 1 --batch-size 4 --iterations 2 --preview-every 0 --log-every 1 --save-every 2 --rl-after 0".split()
    folder = train.train(config.parse([*common, *flags, "--out", str(tmp_path / name)]))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], run_folder.newest(folder) / "unet"


def test_gate_stops_reinforcement_while_d_is_blind(tmp_path):
    """At --rl-gate 1 nothing is reinforced, to the bit what --rl-after 1000 gives; at 0 everything is, and costs K - 1 passes more."""
    shut, weights_shut = run(tmp_path, "shut", "--rl-gate", "1")
    late, weights_late = run(tmp_path, "late", "--rl-after", "1000")
    open_, weights_open = run(tmp_path, "open", "--rl-gate", "0")
    read = lambda folder: (folder / "diffusion_pytorch_model.safetensors").read_bytes()  # noqa: E731
    assert all(m["rl_open"] == 0 and m["rl_loss"] == 0 and m["d_accuracy_unseen"] < 1 for m in shut) and all(m["rl_open"] == 1 for m in open_)
    assert "rl_open" not in late[-1] and read(weights_shut) == read(weights_late) != read(weights_open)
    assert open_[-1]["passes"] - shut[-1]["passes"] == 2 * 4 * 3 * 3  # loops, samples, transitions with a density, a pass with gradient


def test_gate_is_shut_while_d_is_at_chance(tmp_path, monkeypatch):
    """A head whose logits are all 0 judges half of the latents right: below the default gate, so nothing is reinforced."""
    real = dmd2.Head.forward
    monkeypatch.setattr(dmd2.Head, "forward", lambda self, features: 0 * real(self, features))
    blind, _ = run(tmp_path, "blind")
    assert all(m["d_accuracy_unseen"] == 0.5 and m["rl_open"] == 0 and m["rl_loss"] == 0 for m in blind)


def test_a_frozen_reward_is_another_run_s_discriminator(tmp_path, monkeypatch):
    """With --judge, R comes from that run's score estimator and head, bit for bit, while the run's own learn on; one without a D is refused."""
    run(tmp_path, "first", "--rl-gate", "1")
    seen, judges, judged = [], [], advdmd.judged
    monkeypatch.setattr(train, "assemble", lambda *args: seen.append(assemble(*args)) or seen[-1])
    monkeypatch.setattr(advdmd, "judged", lambda *args: judges.append(args[:2]) or judged(*args))
    run(tmp_path, "second", "--rl-gate", "0", "--judge", str(tmp_path / "first"))
    own, (fake, head) = seen[0], seen[0].judge
    assert judges == [(fake, head), (own.fake, own.head)] * 2  # in each of 2 loops: for RL, then for D's own loss
    first = assemble(config.parse(["--preset", "advdmd"]), 1, torch.device("cpu"))
    checkpoint.restore(tmp_path / "first", {name: first.players[name] for name in ("fake", "head")}, optimizers=False)
    for frozen, kept, trained in ((fake.net, first.fake.net, own.fake.net), (head, first.head, own.head)):
        assert all(torch.equal(a, b) for a, b in zip(frozen.parameters(), kept.parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(frozen.parameters(), trained.parameters(), strict=True))
    plain = train.train(config.parse(["--batch-size", "2", "--iterations", "1", "--preview-every", "0", "--out", str(tmp_path / "pixel")]))
    with pytest.raises(train.UserError, match="--gan latent or online"):
        run(tmp_path, "third", "--judge", str(plain))
