"""SDXL at 1024 without weights: an iteration of each stage on fake tensors (no numbers), and what it would need."""

import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train
from engine import dry_run, real_size
from engine.batch import Batch
from engine.errors import UserError
from engine.models import load_denoiser

PUBLISHED = {  # of the released weights' files; SD3's has its fixed table of positions too
    "sdxl": 2_567_463_684,
    "sd3": 2_084_951_104 - 192**2 * 1536,
    "t5": 4_762_310_656,
    "zimage": 6_154_908_736,
}
MILLIONS = {"sd35-medium": 2243, "sd35-large": 8057, "qwen": 20430, "qwen words": 8292, "zimage words": 4022}


def traced(preset, *flags, metered=False):
    """-> config, networks, what was measured or logged, and per player the weights without a gradient."""
    config = train.read(["--preset", preset, "--student-steps", "2", *flags])  # the other steps are as the first
    config.checkpointing = metered  # it doubles the forward pass
    prepare, iterate = train.method(config)
    lacking = {}

    def watched(nets):
        prepare(nets)
        for name, (module, _, lora) in nets.trained.items():
            which = f".{lora}." if lora else ""
            trained = {k: p for k, p in module.named_parameters() if p.requires_grad and which in k}
            assert trained
            lacking[name] = set(trained)
            for k, p in trained.items():
                p.register_post_accumulate_grad_hook(lambda p, k=k, name=name: check(p, k, name))

    def check(p, k, name):
        if (p.grad.shape, p.grad.dtype) == (p.shape, p.dtype):
            lacking[name].discard(k)

    if metered:
        nets, measured = dry_run.measure(config, {"distillation": 1}, watched, iterate, train.prefer)
        return config, nets, measured, lacking
    with FakeTensorMode(allow_non_fake_inputs=True):
        nets = real_size.assemble(config, 2, watched)
        nets.meter = SimpleNamespace(turn=lambda name: None)
        c = nets.encoder.encode(["a", "b"])
        batch = Batch(torch.empty(2, 3, 1024, 1024), ["a", "b"], c, [0, 1], loop=1)
        logged = train.prefer(nets, batch) if config.stage == 2 else iterate(nets, batch, config.ttur)
    return config, nets, logged, lacking


@pytest.fixture(scope="module")
def sdxl():
    return traced("sdxl-4step", metered=True)


FEWER = {  # layers that are alike: one of each is traced
    "sdxl-stage2": (real_size.SDXL, {"transformer_layers_per_block": [1, 1, 1]}),
    "sd3-4step": (real_size.SD3, {"num_layers": 2}),
    "sd35-medium-4step": (real_size.SD35_MEDIUM, {"num_layers": 3, "dual_attention_layers": (0,)}),
    "sd35-large-4step": (real_size.SD35_LARGE, {"num_layers": 2}),
    "qwen-4step": (real_size.QWEN, {"num_layers": 2}),
    "zimage-4step": (real_size.Z_IMAGE, {"n_layers": 2, "n_refiner_layers": 1}),
}
# presets that are traced with a latent discriminator
LATENT = dict.fromkeys(("sd35-large-4step", "zimage-4step"), ("--method", "dmd2"))
LAST_TEXT = re.compile(r"transformer_blocks\.1\.(attn\.to_add_out|txt_mlp)")  # of use to nothing


@pytest.mark.parametrize("preset", ["sdxl-4step", *FEWER])
@pytest.mark.xdist_group("full_size")
def test_iteration_at_full_size(preset, request, monkeypatch):
    """SDXL's UNets in bf16, or two LoRAs on a transformer, the VAE, SAM ViT-B: no shape or dtype clashes.

    Every weight that a network trains gets a gradient of its own shape and type.
    """
    if preset in FEWER:
        geometry, changes = FEWER[preset]
        for key, value in changes.items():
            monkeypatch.setitem(geometry, key, value)
        config, nets, seen, lacking = traced(preset, *LATENT.get(preset, ()))
    else:
        config, nets, seen, lacking = request.getfixturevalue("sdxl")
    if config.stage == 2:
        assert lacking["G"] == set() and seen["rl_loss"].shape == ()
    else:
        if preset == "qwen-4step":
            lacking = {name: {k for k in keys if not LAST_TEXT.search(k)} for name, keys in lacking.items()}
        assert lacking == {"G": set(), "fake": set(), "head" if preset in LATENT else "D": set()}
        assert set(seen["distillation"]) == {"G", "fake", "D"} if preset == "sdxl-4step" else "d_loss" in seen
    if preset == "sd35-medium-4step":  # a buffer, which FSDP2 does not shard
        (table,) = (row for row in dry_run.states(nets) if row[0] == "tables of positions")
        assert table[1:] == (384**2 * 1536, 4 * 384**2 * 1536, 0, 0, False)
    if preset == "sd35-large-4step":
        assert nets.D.net[0].weight.shape[:2] == (2432, 2432) and len(nets.D.net) == 6 * 3 + 3  # of 64 x 64 tokens


def test_blocks_that_are_alike_add_the_same(monkeypatch):
    """Z-Image's network at full width: 1 and 2 blocks traced give the figures of 4."""
    fast = "--gan-weight 0 --student-steps 1 --ttur 1 --lora-rank 0"
    config = train.read(["--preset", "zimage-4step", *fast.split()])
    run = (config, {"distillation": 1}, *train.method(config), train.prefer)
    monkeypatch.setattr(dry_run, "FEW", 1)
    monkeypatch.setattr(dry_run, "MORE", 2)
    monkeypatch.setitem(real_size.Z_IMAGE, "n_layers", 4)
    monkeypatch.setitem(real_size.Z_IMAGE, "n_refiner_layers", 1)
    found = {}
    for name, measured in (("by a line", dry_run.measure(*run)[1]), ("traced", dry_run.trace(*run)[1])):
        found[name] = measured["distillation"]
    for player, (peak, flops) in found["traced"].items():
        assert found["by a line"][player] == (pytest.approx(peak, rel=1e-3), flops)


def test_geometry_is_the_published_one():
    """As many weights as in the released files; T5 is SD3's alone, unless --t5 off."""
    with torch.device("meta"):
        nets = {base: real_size.denoiser_of(base) for base in real_size.BASES}
    sd3 = ["--preset", "sd3-4step"]
    *clips, nets["t5"] = real_size.text_encoders(train.read(sd3))
    for base in ("qwen", "zimage"):
        (nets[f"{base} words"],) = real_size.text_encoders(train.read(["--preset", f"{base}-4step"]))
    found = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert {name: round(found.pop(name) / 1e6) for name in MILLIONS} == MILLIONS
    assert found == PUBLISHED
    for flags, length in ((sd3, 256), ([*sd3, "--text-length", "512"], 512), ([*sd3, "--t5", "off"], 77)):
        config = train.read(flags)
        assert len(clips) + (length > 77) == len(real_size.text_encoders(config))
        assert real_size.Words(config).encode(["a"])["tokens"].shape == (1, 77 + length, 4096)


def test_memory_follows_storages():
    """By hand: of four products y = x w in a chain, 4,000 bytes each, autograd keeps every input and the last output.

    Without it two live at once.
    """
    w = torch.ones(1000, requires_grad=True)

    def chain():
        x = torch.zeros(1000)
        for _ in range(4):
            x = x * w
        return x

    for fake in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
            with dry_run.Meter() as with_graph:
                y = chain()
            assert with_graph.live == with_graph.peak == 5 * 4000
            del y
            assert with_graph.live == 0
            with dry_run.Meter() as without, torch.no_grad():
                y = chain()
            assert y.shape == (1000,) and (without.live, without.peak) == (4000, 2 * 4000)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_meter_on_fake_tensors(checkpointing):
    """A step of the toy's UNet, forward and backward: what lives at the peak on real tensors, and on fake ones.

    Operations: as torch's own counter has them, those that checkpointing repeats included. Its peak is not compared:
    when the garbage collector comes is in it."""
    c = {
        "encoder_hidden_states": torch.zeros(2, 32, 256),
        "added_cond_kwargs": {"text_embeds": torch.zeros(2, 64), "time_ids": torch.zeros(2, 6)},
    }
    config, peaks = dict(load_denoiser("toy/sdxl").net.config), []
    for fake in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
            net = UNet2DConditionModel.from_config(config)
            if checkpointing:
                net.enable_gradient_checkpointing()
            with dry_run.Meter() as meter, FlopCounterMode(display=False) as counter:
                net(torch.zeros(2, 4, 16, 16), torch.tensor([5, 5]), **c).sample.sum().backward()
        peaks.append(meter.peak)
        assert meter.flops == counter.get_total_flops() > 10**9
    assert (
        checkpointing or peaks[1] == pytest.approx(peaks[0], rel=0.01) and peaks[0] > 10**7
    )  # attention keeps other statistics on real tensors


@pytest.mark.xdist_group("full_size")
def test_dry_run_as_a_command(sdxl, monkeypatch, capsys):
    """SDXL on 4 GPUs: each printed figure by arithmetic from others; then, by the same trace, too little memory."""
    flags = ["--preset", "sdxl-4step", "--dry-run", "--micro-batch", "2", "--gpu-memory", "80", "--iterations", "500"]
    _, nets, found, _ = sdxl
    monkeypatch.setattr(dry_run, "measure", lambda *a: (nets, found))  # as traced already
    train.main([*flags, "--gpus", "4"])
    out = capsys.readouterr().out

    def row(name):
        return [float(v) for v in re.search(rf"^{re.escape(name)} +([\d. ]+)$", out, re.M)[1].split()]

    near = lambda value: pytest.approx(value, abs=0.02, rel=1e-3)  # noqa: E731
    P = PUBLISHED["sdxl"] / 1e9
    for name in ("generator G", "score estimator"):
        assert row(name) == near([1e3 * P, 4 * P, 4 * P, 8 * P, 12 * P, 16 * P, 4 * P])
    assert row("teacher") == near([1e3 * P, 2 * P, 0, 0, 0, 2 * P, P / 2])
    heads = row("D's heads")
    assert heads[4] == near(12e-3 * heads[0]) and heads[5] == heads[6] == near(16e-3 * heads[0])
    names = [
        "teacher",
        "generator G",
        "score estimator",
        "text encoders",
        "VAE",
        "SAM",
        "D's heads",
        "FSDP2's gathered blocks",
    ]
    assert row("sum") == pytest.approx(
        [sum(column) for column in zip(*map(row, names), strict=True)], abs=0.05 * len(names)
    )  # of rounded figures

    text = re.search(
        r"with text encoders ([\d.]+) GB on a GPU, with --cache-text ([\d.]+), and ([\d.]+) MB of disk", out
    )
    words = row("text encoders")[6]
    assert [float(n) for n in text.groups()] == [near(row("sum")[6]), near(row("sum")[6] - words), 0.32]

    on_disk, copied = map(float, re.search(r"a checkpoint: ([\d.]+) GB .* copies ([\d.]+) GB", out).groups())
    assert on_disk == pytest.approx(28 * P, abs=0.1) and copied == pytest.approx(6 * P, abs=0.1)  # the student twice

    turns = [row(f"distillation: {name}") for name in ("generator", "score estimator", "discriminator")]
    (iteration,), (hours,) = (
        row("an iteration of 64 samples"),
        re.search(r"500 x 64 .* 400 .*: ([\d.]+) GPU-hours", out).groups(),
    )
    assert iteration == pytest.approx(64 * sum(flops for _, flops in turns), rel=2e-3)
    assert float(hours) == pytest.approx(500 * iteration / 400 / 3600, abs=0.06)
    (*_, whole, sharded), peak, free = row("sum"), max(peak for peak, _ in turns), 0.92
    for layout, held in (("whole, as DDP would hold it", whole), ("sharded", sharded)):
        assert row(layout) == pytest.approx([(held + 2 * peak) / free, max(0, (80 * free - held) // peak)], abs=0.1)
    by_ranks = [float(v) for v in re.search(r"over 1, 2, 8, 64 GPUs: (.*) GB on each", out)[1].split(", ")]
    assert by_ranks == [near(whole - 34 * P * (1 - 1 / n)) for n in (1, 2, 8, 64)]  # teacher, and both that are trained
    assert (
        "\nverdict: fits on 4 x 80 GB; one sample at once needs at least "
        "4 x 48 GB or 2 x 80 GB or 1 x 141 GB (--optimizer adamw8bit: " in out
    )

    kept = replace(nets, config=replace(nets.config, cache_text="kept"))
    monkeypatch.setattr(dry_run, "measure", lambda *a: (kept, found))
    train.main([*flags, "--gpus", "4"])
    again = capsys.readouterr().out
    assert text[0] in again and re.search(r"^text encoders +0\.0 +0\.00", again, re.M)
    monkeypatch.setattr(dry_run, "measure", lambda *a: (nets, found))

    def verdict(*more):
        dry_run.report(train.read([*flags, *more]), None, None, None)
        return capsys.readouterr().out.splitlines()[-2]

    tight = verdict(
        "--gpus", "2", "--micro-batch", "32"
    )  # 80 x 0.92 - 51 GB leave room for one sample, moments in 8 bits for two
    ways = "--micro-batch 1, --optimizer adamw8bit: 2 at once, --gan-crop 512: less of the VAE and SAM, more GPUs"
    assert tight.startswith(
        f"verdict: does NOT fit on 2 x 80 GB (helps: {ways}); one sample at once needs at least 4 x 48 GB"
    )
    for way in (["--micro-batch", "1"], ["--micro-batch", "2", "--optimizer", "adamw8bit"]):
        assert verdict("--gpus", "2", *way).startswith("verdict: fits on 2 x 80 GB; ")
    assert (
        "(helps: --optimizer adamw8bit" not in (lone := verdict("--gpus", "1")) and "does NOT fit" in lone
    )  # nor with one sample, either way


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--preset", "toy"], "geometry of SDXL, SD3-Medium, SD3.5, Qwen-Image and Z-Image"),
        (["--preset", "sdxl-4step", "--method", "advdmd"], "advdmd"),
        (["--preset", "sd35-large-4step", "--stage", "2"], "stage 2 of SDXL alone"),
        (["--preset", "sdxl-4step", "--gpus", "5"], "not divisible by --gpus 5"),
        (["--preset", "sdxl-4step", "--gpus", "8", "--micro-batch", "3"], "--micro-batch"),
    ],
)
def test_dry_run_refuses(flags, why):
    with pytest.raises(UserError, match=why):
        dry_run.report(train.read(flags), None, None, None)


def test_loras_beside_a_teacher_of_their_own():
    """Z-Image with two blocks: a second frozen network; on one GPU FSDP2 gathers LoRAs alone.

    With the network in 8 bits it never gathers linear weights.
    """
    flags = ["--preset", "zimage-4step", "--dry-run", "--teacher", "another"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        nets = real_size.assemble(train.read(flags), 1, train.prepare, depth=2)
    rows = {row[0]: row for row in dry_run.states(nets)}
    assert rows["teacher"] == ("teacher", *rows["frozen network under the LoRAs"][1:])
    assert rows["teacher"][1] == dry_run.count(nets.teacher.net) and nets.teacher.net is not nets.G.net
    loras = [
        sum(p.numel() for p in block.parameters() if p.requires_grad) for block in nets.G.family.blocks(nets.G.net)
    ]
    whole = [dry_run.count(block) for block in nets.G.family.blocks(nets.G.net)]
    assert dry_run.gathered(nets, 1) == 4 * max(loras) < dry_run.gathered(nets, 2) == 4 * max(whole)
    nets.config = replace(nets.config, quantize_frozen="int8")
    assert dry_run.gathered(nets, 1) == 4 * max(loras) <= dry_run.gathered(nets, 2) < 0.4 * max(whole)
    assert dry_run.states(nets)[1][2] == rows["teacher"][1]  # a byte each


@pytest.mark.xdist_group("ranks")
def test_table_of_states_is_what_two_ranks_hold(two_ranks):
    """Weights, gradients and moments of the toy's networks on each of 2 gloo ranks are dry_run's to 2 %."""
    two_ranks(WEIGH)


WEIGH = """
from dataclasses import fields

import torch, torch.distributed as dist
import train
from engine import dry_run, real_size
from engine.batch import Batch
from engine.batch import Batch
from engine.distributed import start_process
from engine.networks import Networks, assemble

size = lambda tensors: sum(getattr(v, "_local_tensor", v).nbytes for v in tensors)
gradients = {}

class Weighed(Networks):
    def step(self, name, *args):
        gradients[name] = size(p.grad for p in self.weights(name))
        return super().step(name, *args)

rank, ranks, device = start_process()
made = assemble(train.read(["--batch-size", "4"]), ranks, device, train.prepare)
toy = Weighed(**{f.name: getattr(made, f.name) for f in fields(Networks)})
prompts = ["a red circle", "a blue ring"]
train.flash(toy, Batch(torch.zeros(2, 3, 64, 64), prompts, toy.encoder.encode(prompts), [2 * rank, 2 * rank + 1], 1), 1)
frozen = {"teacher": toy.teacher.net, "VAE": toy.vae, "SAM": toy.D.encoder[0]}
held = {row: size(net.parameters()) for row, net in frozen.items()}
for row, name in {"generator G": "G", "score estimator": "fake", "D's heads": "D"}.items():
    states = toy.players[name][1].state.values()
    moments = [v for state in states for v in state.values() if torch.is_tensor(v) and v.dim()]
    held[row] = size(toy.weights(name)) + gradients[name] + size(moments)
table = {row[0]: dry_run.a_gpu([row], ranks) for row in dry_run.states(toy, frozen=4)}
del table["text encoders"]  # SDXL's, not the toy's
assert table.keys() == held.keys()
held["sum"], table["sum"] = sum(held.values()), sum(table.values())
for name, n in held.items():
    n = torch.tensor(float(n))
    dist.all_reduce(n)
    assert abs(n / ranks / table[name] - 1) < 0.02, (name, n / ranks, table[name])
"""
