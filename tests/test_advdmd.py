"""AdvDMD: its discriminator on states, which of them have a likelihood, the gate, a frozen reward."""

import json

import pytest
import torch

import train
from diffusion import Schedule, add_noise, randn
from engine import checkpoint, run_folder
from engine.batch import Batch
from engine.errors import UserError
from engine.networks import assemble
from siblings import advdmd


def test_last_transition_has_no_likelihood():
    """Of K states that are judged, K - 1 transitions have a density; the end's advantage goes to the last of them."""
    A = torch.tensor([[1.0, 2.0, 3.0, 10.0]])
    assert advdmd.credit(A).tolist() == [[1.0, 2.0, 13.0]]
    S = Schedule().steps(4)
    assert [int(t) for t in torch.stack(advdmd.levels(S, torch.zeros(1, 1, 1, 1))).flatten()] == [749, 499, 249, 0]


def test_discriminator_on_states():
    """By hand: -log D of reals, -log(1 - D) of states; the accuracy; reals come first, noised to each state's level.

    The clean end has no noise.
    """
    real, made = torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0, 3.0]])
    by_hand = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(made)).log().mean())
    torch.testing.assert_close(advdmd.discriminator_loss(real, made), by_hand)
    assert advdmd.accuracy(real, made) == 0.75 and advdmd.accuracy(-real, -made) == 0.25

    class Fake:
        schedule = Schedule()

        def with_features(self, z, t, c):
            return None, z

    S, (z, z_1, z_2, x_0, x_real, eps) = (
        Schedule().steps(3),
        torch.randn(6, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0)),
    )
    reals, states = advdmd.logits_of_both(Fake(), lambda z: z.flatten(), [z, z_1, z_2, x_0], x_real, S, eps, None)
    torch.testing.assert_close(states, torch.stack([z_1, z_2, x_0], 1).flatten(1))
    noised = [add_noise(Fake.schedule, x_real, t.expand(2), eps) for t in S[1:]]
    torch.testing.assert_close(reals, torch.stack([*noised, x_real], 1).flatten(1))


def run(model, tmp_path, name, *flags):
    few = "--batch-size 4 --iterations 2 --preview-every 0 --log-every 1 --save-every 2"
    common = f"--preset advdmd --ttur 1 --rl-after 0 --model {model} {few}".split()
    folder = train.train(train.read([*common, *flags, "--out", str(tmp_path / name)]))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], run_folder.newest(
        folder
    ) / "unet"


def test_gate_stops_reinforcement_while_d_is_blind(small_toys, tmp_path):
    """At --rl-gate 1 nothing is reinforced, to the bit as with --rl-after 1000; at 0 all is, at K - 1 passes more."""
    shut, weights_shut = run(small_toys["sdxl"], tmp_path, "shut", "--rl-gate", "1")
    late, weights_late = run(small_toys["sdxl"], tmp_path, "late", "--rl-after", "1000")
    open_, weights_open = run(small_toys["sdxl"], tmp_path, "open", "--rl-gate", "0")
    read = lambda folder: (folder / "diffusion_pytorch_model.safetensors").read_bytes()  # noqa: E731
    assert all(m["rl_open"] == 0 and m["rl_loss"] == 0 and m["d_accuracy_unseen"] < 1 for m in shut) and all(
        m["rl_open"] == 1 for m in open_
    )
    assert "rl_open" not in late[-1] and read(weights_shut) == read(weights_late) != read(weights_open)
    assert (
        open_[-1]["passes"] - shut[-1]["passes"] == 2 * 4 * 3 * 3
    )  # loops, samples, transitions with a density, a pass with gradient


def test_gate_is_shut_while_d_is_at_chance(monkeypatch):
    """A head whose logits are all 0 classifies half of the latents right, which is below the default gate.

    One that is right of x_0 alone, wrong of the three other states: a quarter, and all of x_0.
    """
    config = train.read(["--preset", "advdmd", "--batch-size", "4"])
    nets = assemble(config, 1, torch.device("cpu"), advdmd.prepare)
    torch.nn.init.zeros_(nets.D.net[-1].weight)
    torch.nn.init.zeros_(nets.D.net[-1].bias)
    prompts = ["a red circle"] * 4
    batch = Batch(torch.zeros(4, 3, 64, 64), prompts, nets.encoder.encode(prompts), list(range(4)), loop=1)
    states = [torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    loss, seen = advdmd.reinforce(nets, batch, states)
    assert seen["d_accuracy_unseen"] == seen["d_accuracy_x0"] == 0.5 and seen["rl_open"] == 0 and loss == 0
    right = torch.tensor([[-1.0, -1, -1, 1]] * 4)
    monkeypatch.setattr(advdmd, "logits_of_both", lambda *_: (right, -right))
    _, seen = advdmd.reinforce(nets, batch, states)
    assert (seen["d_accuracy_unseen"], seen["d_accuracy_x0"], seen["rl_open"]) == (0.25, 1, 0)
    assert all(p.grad is None for p in nets.G.net.parameters())


@pytest.mark.parametrize("base, lora", [("sdxl", []), ("sd3", ["--lora-rank", "2"])])
def test_a_frozen_reward_is_another_run_s_discriminator(base, lora, small_toys, tmp_path):
    """With --judge, R comes from that run's score estimator and head, bit for bit, while the run's own are trained.

    A run without a latent discriminator is refused.
    """
    model = small_toys[base]
    run(model, tmp_path, "first", "--rl-gate", "1", "--fake-lr", "1e-2", *lora)
    common = ["--preset", "advdmd", "--batch-size", "4", "--model", model, *lora]
    flags = [*common, "--judge", str(tmp_path / "first")]
    nets = assemble(train.read(flags), 1, torch.device("cpu"), advdmd.prepare)
    first = assemble(train.read(common), 1, torch.device("cpu"), advdmd.prepare)
    restored = {name: first.players[name] for name in ("G" if lora else "fake", "head")}  # LoRAs share one network
    checkpoint.restore(tmp_path / "first", restored, optimizers=False)
    fake, head = nets.rewarding
    assert fake is not nets.fake and head is not nets.D and first.rewarding == (first.fake, first.D)
    for frozen, kept, own in ((fake.net, first.fake.net, nets.fake.net), (head, first.D, nets.D)):
        assert all(torch.equal(a, b) for a, b in zip(frozen.parameters(), kept.parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(frozen.parameters(), own.parameters(), strict=True))
        assert not any(p.requires_grad for p in frozen.parameters())
    prompts = ["a red circle"] * 4
    batch = Batch(torch.zeros(4, 3, 64, 64), prompts, nets.encoder.encode(prompts), list(range(4)), loop=1)
    states = [torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    eps = randn(batch.generators("unseen"), states[0])
    with torch.no_grad():
        rest = states, nets.vae.encode(batch.x_real), nets.S, eps, batch.c
        _, R = advdmd.logits_of_both(fake, head, *rest)
        torch.testing.assert_close(R, advdmd.logits_of_both(first.fake, first.D, *rest)[1])
        assert not torch.allclose(R, advdmd.logits_of_both(nets.fake, nets.D, *rest)[1])
    assert advdmd.reinforce(nets, batch, states)[1]["reward"] == R[:, -1].mean()

    no_head = ["--batch-size", "2", "--iterations", "1", "--gan-weight", "0", "--preview-every", "0"]
    plain = train.train(train.read([*no_head, "--model", model, "--out", str(tmp_path / "flash")]))
    with pytest.raises(UserError, match="--method dmd2 or advdmd"):
        assemble(train.read([*flags[:-1], str(plain)]), 1, torch.device("cpu"), advdmd.prepare)
