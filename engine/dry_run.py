"""What a run would need, without weights and without a GPU.

    python train.py --preset sdxl-4step --dry-run --gpus 8 --gpu-memory 80

The networks are built at real size from fake tensors (engine/real_size.py), and train.py's own iteration runs on them.
Parameters and floating-point operations are counted, with those that --checkpointing repeats. The lifetime of every
tensor's storage gives the peak of activations and temporaries. Weights and optimizer states follow from the parameters:

    trained         16 bytes a parameter: fp32 weight, gradient, two AdamW moments (10 with --optimizer adamw8bit);
                    sharded by FSDP2
    frozen          2 bytes a parameter (bf16), sharded too: teacher, network under LoRAs, reference, R's UNet
                    (--quantize-frozen int8: the network under LoRAs, on every GPU, and text encoders 1 byte)
    on every GPU    text encoders (none with --cache-text) and SAM (bf16), VAE (fp32), the discriminators' heads

Left out: the CUDA context, fragmentation and NCCL's buffers (an allowance of 8 %); the buffers in which FSDP2 reduces a
block's gradients (bf16 and fp32, 7 GB for SDXL's largest), made when VAE and SAM have freed theirs; and previews, which
draw 4 pictures of 1024 pixels together.
"""

import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.base_model import family_of_net
from engine.batch import Batch
from engine.errors import UserError
from engine.meter import Meter
from engine.real_size import BASES, DEPTHS, assemble, base_of, drop_gradients, text_encoders

ALLOWANCE = 0.08  # of a GPU's memory
MOMENTS = {"adamw": 8, "adamw8bit": 2 * (1 + 4 / 256)}  # bytes a parameter; torchao keeps an fp32 scale per 256 numbers
FEW, MORE = 2, 4  # blocks that are traced of many
IDLE = "a loop without G (TTUR)"
TURNS = {"G": "generator", "fake": "score estimator", "D": "discriminator", "G, RL": "generator"}


def measure(config, kinds, prepare, iterate, prefer):
    """One loop of each kind on one sample -> the networks, {kind: {player: (bytes at the peak, operations)}}.

    A player's figures are those between the previous optimizer step and its own. Of a network whose many blocks are all
    alike, FEW of them and MORE are traced: each block adds the same.
    """
    geometry = BASES[base_of(config.preset)][1]
    blocks = geometry.get(DEPTHS.get(base_of(config.preset)), 0)
    if blocks <= MORE:
        return trace(config, kinds, prepare, iterate, prefer)
    _, few = trace(config, kinds, prepare, iterate, prefer, FEW)
    _, more = trace(config, kinds, prepare, iterate, prefer, MORE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        nets = assemble(config, 1, prepare)
    line = lambda a, b: a + (b - a) * (blocks - FEW) // (MORE - FEW)  # noqa: E731
    measured = {kind: {name: tuple(map(line, few[kind][name], more[kind][name])) for name in few[kind]} for kind in few}
    return nets, measured


def trace(config, kinds, prepare, iterate, prefer, depth=None):
    """`measure` on fake tensors, of a network with this number of blocks, by default its own."""
    measured = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        nets = assemble(config, 1, prepare, depth=depth)
        drop_gradients(nets)
        picture = torch.empty(1, 3, config.resolution, config.resolution)
        c = nets.encoder.encode(["a"])
        for kind in kinds:
            n = 1 if kind == IDLE else config.ttur  # every TTUR-th loop of distillation moves G
            batch = Batch(picture, ["a"], c, [0], loop=n * (config.rl_ratio + 1 if config.stage == 2 else 1))
            with Meter() as nets.meter:
                if kind == "preference":
                    prefer(nets, batch)
                else:
                    iterate(nets, batch, n)
            measured[kind] = {name: found for name, found in nets.meter.turns.items() if found[1]}
    return nets, measured


def count(module):
    """The parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def states(nets, optimizer="adamw", frozen=2):
    """Rows of (component, parameters, bytes of weights, of gradients, of AdamW's two moments, whether FSDP2 shards it).

    frozen: bytes a weight of a frozen network.
    """
    words = 0 if nets.config.cache_text else sum(map(count, text_encoders(nets.config)))
    net = nets.G.net
    moment = MOMENTS[optimizer]
    lora = sum(p.numel() for name, p in net.named_parameters() if ".student." in name)
    whole = count(net) - 2 * lora
    trained = lambda name, n, sharded=True: (name, n, 4 * n, 4 * n, moment * n, sharded)  # noqa: E731
    kept = lambda name, n, sharded=True, size=frozen: (name, n, size * n, 0, 0, sharded)  # noqa: E731
    rows = [kept("frozen network under the LoRAs" if lora else "teacher", whole)]
    if nets.config.quantize_frozen:
        rows = [kept("frozen network under the LoRAs, int8", whole, False, 1)]
    if lora and nets.config.teacher:
        size, sharded = (1, False) if nets.config.quantize_frozen else (frozen, True)
        rows += [kept("teacher", whole, sharded, size)]
    rows += [trained("generator G", lora or whole), trained("score estimator", lora or whole)]
    tables = [b for net in dict.fromkeys((nets.teacher.net, nets.G.net, nets.fake.net)) for b in net.buffers()]
    if tables:  # SD3's fixed positions
        rows += [("tables of positions", sum(b.numel() for b in tables), sum(b.nbytes for b in tables), 0, 0, False)]
    of_words = 1 if nets.config.quantize_frozen else frozen
    rows += [kept("text encoders", words, False, of_words), kept("VAE", count(nets.vae), False, 4)]
    if "D" in nets.players:
        rows += [kept("SAM", count(nets.D.encoder[0]), False), trained("D's heads", count(nets.D), False)]
    if "head" in nets.players:
        rows += [trained("latent discriminator's head", count(nets.D), False)]
    if nets.R:
        unet = count(nets.R.unet)
        rows += [kept("reference", whole), kept("reward model's UNet", unet)]
        rows += [kept("its projection", count(nets.R) - unet, False), kept("its text encoders", words, False, of_words)]
        rows += [("moments of the preference updates", 0, 0, 0, moment * (lora or whole), True)]
    return rows


def gathered(nets, gpus):
    """Bytes of FSDP2's gathered blocks: bf16, the largest one and the next. Weights in 8 bits stay where they are.

    On one GPU what is frozen does so too.
    """
    net = nets.G.net
    stay = ()
    if gpus == 1:
        stay = {p for p in net.parameters() if not p.requires_grad}
    elif nets.config.quantize_frozen and not nets.R:  # stage 2 gathers whole networks beside them
        stay = {m.weight for m in net.modules() if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad}
    weights = lambda block: sum(p.numel() for p in block.parameters() if p not in stay)  # noqa: E731
    return 2 * 2 * max(map(weights, family_of_net(net).blocks(net)))


def a_gpu(rows, gpus):
    """Bytes on each of `gpus`, as train.py shards them."""
    return sum(sum(parts) / (gpus if sharded else 1) for parts, sharded in ((r[2:5], r[5]) for r in rows))


def report(config, prepare, iterate, prefer):
    """Print what the run needs, and whether it fits -> bytes a GPU at the peak, without the allowance.

    prepare, iterate: the method's; prefer: train.py's. Raises UserError for a preset of another geometry, and for a
    batch that the GPUs do not divide.
    """
    refuse_unknown(config)
    began = time.time()
    gpus = config.gpus
    per_gpu = config.batch_size // gpus
    size = f"{config.resolution} pixels, batch {config.batch_size}, {gpus} GPUs of {config.gpu_memory:g} GB"
    print(f"{config.preset}: stage {config.stage}, {size}\n")
    kinds = {"distillation": 1}  # how often each kind of loop comes
    if config.ttur > 1:
        kinds[IDLE] = config.ttur - 1
    if config.stage == 2:
        joint = {} if config.rl_only else kinds
        kinds = {"preference": config.rl_ratio * config.ttur, **joint}
    nets, measured = measure(config, kinds, prepare, iterate, prefer)
    rows = states(nets, config.optimizer)
    held = lambda n, rows=rows: a_gpu(rows, n) + gathered(nets, n)  # noqa: E731
    whole, sharded = held(1), held(gpus)
    print_states(config, nets, rows, held)
    print_text(nets, sharded)
    print_operations(config, kinds, measured)

    peak = max(peak for turns in measured.values() for peak, _ in turns.values())
    at_once = config.micro_batch or per_gpu
    free = 1 - ALLOWANCE
    most = lambda fixed, gb=config.gpu_memory: max(0, int((gb * 1e9 * free - fixed) // peak))  # noqa: E731
    print(f"\n{f'a GPU, {ALLOWANCE:.0%} kept free':50}{f'{at_once} at once, GB':>15}{'most at once':>15}")
    for layout, fixed in (("whole, as DDP would hold it", whole), ("sharded", sharded)):
        print(f"{layout:50}{(fixed + at_once * peak) / free / 1e9:15.1f}{most(fixed):15}")

    fewest = {}
    for optimizer in dict.fromkeys((config.optimizer, "adamw8bit")):
        table = states(nets, optimizer)
        fewest[optimizer] = fewest_gpus(config, lambda n, gb, table=table: most(held(n, table), gb))
    least = fewest[config.optimizer]
    light = fewest["adamw8bit"]
    most_light = most(held(gpus, states(nets, "adamw8bit")))
    verdict = "fits"
    helps = ""
    if at_once > most(sharded):
        verdict = "does NOT fit"
        helps = f" (helps: {', '.join(remedies(config, measured, per_gpu, most(sharded), most_light))})"
    lighter = f" (--optimizer adamw8bit: {light})" if light != least else ""
    needs = f"one sample at once needs at least {least}{lighter}"
    print(f"\nverdict: {verdict} on {gpus} x {config.gpu_memory:g} GB{helps}; {needs}")
    print(f"({time.time() - began:.0f} s)")
    return sharded + at_once * peak


def refuse_unknown(config):
    """Raises UserError for what the dry run does not know, and for a batch that the GPUs do not divide."""
    base = base_of(config.preset)
    if not base:
        unknown = f"not that of --preset {config.preset}: give one of their presets"
        raise UserError(f"--dry-run knows the geometry of SDXL, SD3-Medium, SD3.5, Qwen-Image and Z-Image, {unknown}")
    if config.method in ("dmdr", "advdmd") or config.stage == "reward":
        raise UserError("--dry-run knows neither --method dmdr nor advdmd nor --stage reward")
    if base != "sdxl" and config.stage == 2:
        raise UserError("--dry-run knows stage 2 of SDXL alone: it does not trace DiNa-LRM, SD3's reward model")
    if config.batch_size % config.gpus or config.batch_size // config.gpus % (config.micro_batch or 1):
        batch = f"--batch-size {config.batch_size} is not divisible by --gpus {config.gpus}"
        raise UserError(f"{batch}, or a GPU's part of it not by --micro-batch")


def saved(row):
    """Bytes of a row in a checkpoint: trained weights and their moments."""
    return (row[2] + row[4]) * bool(row[4])


def print_states(config, nets, rows, held):
    """The table of weights, gradients and moments, and the size of a checkpoint. held(n): bytes on each of n GPUs."""
    gpus = config.gpus

    def show(name, n, *gb):
        print(f"{name:34}{n / 1e6:14.1f}" + "".join(f"{v / 1e9:{w}.2f}" for v, w in zip(gb, (10, 11, 9, 12, 14, 16))))

    columns = (
        f"{'weights':>10}{'gradients':>11}{'moments':>9}{'checkpoint':>12}{'a GPU, whole':>14}{'a GPU, sharded':>16}"
    )
    print(f"{'GB':34}{'parameters, M':>14}{columns}")
    for row in rows:
        show(*row[:5], saved(row), a_gpu([row], 1), a_gpu([row], gpus))
    show("FSDP2's gathered blocks", 0, 0, 0, 0, 0, gathered(nets, 1), gathered(nets, gpus))
    show("sum", *(sum(r[n] for r in rows) for n in (1, 2, 3, 4)), sum(map(saved, rows)), held(1), held(gpus))
    by_gpus = ", ".join(f"{held(n) / 1e9:.2f}" for n in (1, 2, 8, 64))
    print(f"\nsharded over 1, 2, 8, 64 GPUs: {by_gpus} GB on each")
    student = 4 * next(r[1] for r in rows if r[0] == "generator G")
    disk = student + sum(map(saved, rows))
    copied = sum(saved(row) / (gpus if row[5] else 1) for row in rows)
    gathers = f"{student / 1e9:.1f} of them the student for diffusers, which rank 0 gathers in host memory"
    copies = f"; every rank copies {copied / 1e9:.1f} GB there before they are written"
    print(f"a checkpoint: {disk / 1e9:.1f} GB on disk, {gathers}" + (copies if config.optimizer == "adamw" else ""))


def print_text(nets, sharded):
    """What a GPU holds with and without --cache-text. sharded: bytes of the table's sum."""
    held = 2 * sum(map(count, text_encoders(nets.config))) * (2 if nets.R else 1)
    least = sharded - (0 if nets.config.cache_text else held)
    prompt = 2 * sum(v.numel() for name, v in nets.null.items() if name != "size")
    both = f"with text encoders {(least + held) / 1e9:.2f} GB on a GPU, with --cache-text {least / 1e9:.2f}"
    print(f"{both}, and {prompt / 1e6:.2f} MB of disk for each prompt")


def print_operations(config, kinds, measured):
    """The table of turns, and the operations and GPU-hours of the run."""
    print(f"\n{'one sample, from one optimizer step to the next':50}{'GB at the peak':>15}{'TFLOP':>10}")
    for kind, turns in measured.items():
        for name, (peak, flops) in turns.items():
            print(f"{f'{kind}: {TURNS[name]}':50}{peak / 1e9:15.2f}{flops / 1e12:10.1f}")
    every = sum(kinds[kind] * sum(flops for _, flops in turns.values()) for kind, turns in measured.items())
    cost = every / sum(kinds.values())
    hours = config.iterations * config.batch_size * cost / (config.gpu_tflops * 1e12) / 3600
    mean = " (mean of the kinds)" if len(kinds) > 1 else ""
    print(f"{f'an iteration of {config.batch_size} samples{mean}':65}{config.batch_size * cost / 1e12:10.1f}")
    samples = f"{config.iterations} x {config.batch_size} samples"
    print(f"{samples} at {config.gpu_tflops:g} sustained TFLOP/s: {hours:.1f} GPU-hours")


def fewest_gpus(config, most):
    """The fewest GPUs of each size that hold one sample at once, as text. most(gpus, gb): samples that fit."""
    divisors = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    found = {gb: next((n for n in divisors if most(n, gb)), None) for gb in (24, 48, 80, 141)}
    return " or ".join(f"{n} x {gb} GB" for gb, n in found.items() if n) or "more GPUs than samples"


def remedies(config, measured, per_gpu, most, most_light):
    """What to change where only `most` samples fit at once. most_light: samples that fit with 8-bit moments."""
    turns = measured.get("distillation", {})
    if not config.checkpointing:
        yield "--checkpointing"
    if most:
        yield f"--micro-batch {max(n for n in range(1, most + 1) if per_gpu % n == 0)}"
    if most_light > most:
        yield f"--optimizer adamw8bit: {most_light} at once"
    if "D" in turns and max(turns, key=turns.get) == "G" and not config.gan_crop:
        yield f"--gan-crop {config.resolution // 2}: less of the VAE and SAM"
    if per_gpu > 1:
        yield "more GPUs"
    elif not most:
        yield "a lower --resolution"
