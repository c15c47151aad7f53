"""DiNa-LRM: the score by matrix products, its published layout, and stage 2 on SD3 with it."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import evaluate
import train
from diffusion import sample_generators
from engine import dina_lrm, reward_layout, run_folder
from engine.errors import UserError
from engine.folders import HERE
from engine.models import load_schedule
from engine.prompts import load_encoder
from engine.reward_model import load_reward_model, save_reward_model, untrained_reward_model
from latent_reward import pair_scores
from toy import reward

WIDTH = 32
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
PUBLISHED = {  # "model" of its config.json, at the depths of a small backbone
    "model_type": "thurstone",
    "backbone_model_id": "stabilityai/stable-diffusion-3.5-medium",
    "num_transformer_layers": 3,
    "freeze_backbone": False,
    "use_lora": True,
    "use_text_features": True,
    "lora_config": {"r": 64, "lora_alpha": 128, "init_lora_weights": "gaussian"},
    "use_logistic": False,
    "visual_head_idx": [1, 2, 3],
    "text_head_idx": [1, 2, 3],
    "use_t_embed": True,
    "reward_head": {"use_proj_in": False, "width": -1, "out_dim": 1, "num_queries": 4, "num_attn_heads": 8},
}


def head_shapes(width, depths):
    """{name: shape} of rm_head.pt."""
    linear = lambda name, n, m: {f"{name}.weight": (m, n), f"{name}.bias": (m,)}  # noqa: E731
    shapes = {"query_tokens": (1, 4, width)}
    for stream in ("visual", "text"):
        for i in range(depths):
            name = f"layer_adapters_{stream}.{i}"
            shapes[f"{name}.layer_embed"] = (1, 1, width)
            shapes |= linear(f"{name}.cond_mlp.0", width, 2 * width)
            shapes |= linear(f"{name}.cond_mlp.2", 2 * width, 2 * width)
            shapes |= linear(f"{name}.proj", width, width // 4)
        shapes |= linear(f"agg_{stream}", depths * width // 4, width)
    for block, names in {"attn1": ["vis", "text"], "attn2": ["vis"]}.items():
        for name in ("to_q", "to_out.0", *(f"to_{k}_{s}" for s in names for k in "kv")):
            shapes |= linear(f"{block}.{name}", width, width)
        for norm in ("norm_q", "norm_v", "norm_t")[: 1 + len(names)]:
            shapes[f"{block}.{norm}.weight"] = (width,)
    for gate in ("attn1.gate_vis", "attn1.gate_text"):
        shapes |= linear(f"{gate}.0", width, width) | linear(f"{gate}.2", width, 1)
    shapes["norm_ff.weight"] = (width,)
    return shapes | linear("ff.0", width, 4 * width) | linear("ff.2", 4 * width, width) | linear("head", width, 1)


class FirstBlocks(nn.Module):
    """What DiNa-LRM's code saves the LoRA of."""

    def __init__(self, net, n):
        super().__init__()
        self.transformer_blocks = net.transformer_blocks[:n]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A reward model's folder as DiNa-LRM's code writes it, on a small pipeline of SD3.5-Medium's shape."""
    path = tmp_path_factory.mktemp("dina")
    pipeline = path / "backbone"
    shutil.copytree("toy/sd3", pipeline, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=7,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=256,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    net.save_pretrained(pipeline / "transformer")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, init_lora_weights="gaussian")
    wrapped = get_peft_model(FirstBlocks(net, 3), lora)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn_like(p)
    wrapped.save_pretrained(path / "checkpoint" / "backbone_lora")
    head = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in head_shapes(WIDTH, 3).items()}
    torch.save(head, path / "checkpoint" / "rm_head.pt")
    (path / "config.json").write_text(json.dumps({"model": PUBLISHED, "training": {"add_noise": True}}))
    return path


def tokens_by_hooks(path, z_t, t, c):
    """h_i, e_i and temb of the whole diffusers transformer, with 2 B A added to its weights."""
    net = SD3Transformer2DModel.from_pretrained(path / "backbone" / "transformer").eval()
    lora = load_file(path / "checkpoint" / "backbone_lora" / "adapter_model.safetensors")
    names = {k.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for k in lora}
    assert len(names) == len(lora) / 2 == 3 * 8 + 2 * 4  # attn of three blocks, attn2 of two
    for name in names:
        A, B = (lora[f"base_model.model.{name}.lora_{k}.weight"] for k in "AB")
        net.get_submodule(name).weight.data += 2 * B @ A
    found = []
    net.time_text_embed.register_forward_hook(lambda _m, _i, out: found.append(out))
    for block in net.transformer_blocks[:3]:
        block.register_forward_hook(lambda _m, _i, out: found.append(out))
    with torch.no_grad():
        net(z_t, c["tokens"], c["pooled"], t)
    temb, *tokens = found
    return [h for _, h in tokens], [e for e, _ in tokens], temb


def score_by_hand(w, h, e, temb):
    """Section 3 of the paper's code in matrix products; w: rm_head.pt."""
    linear = lambda name, x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    silu = lambda x: x / (1 + (-x).exp())  # noqa: E731
    rms = lambda name, x: x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt() * w[f"{name}.weight"]  # noqa: E731

    def stream(name, tokens):
        parts = []
        for i, x in enumerate(tokens):
            at = f"layer_adapters_{name}.{i}"
            style = linear(f"{at}.cond_mlp.2", silu(linear(f"{at}.cond_mlp.0", temb)))
            gamma, beta = style[:, None, :WIDTH], style[:, None, WIDTH:]
            parts.append(linear(f"{at}.proj", x * (1 + gamma) + beta + w[f"{at}.layer_embed"]))
        return linear(f"agg_{name}", torch.cat(parts, -1))

    def attention(q, k, v):
        parts = []
        for at in range(0, WIDTH, WIDTH // 8):
            head = slice(at, at + WIDTH // 8)
            similar = torch.einsum("bqd,bnd->bqn", q[..., head], k[..., head]) / math.sqrt(WIDTH // 8)
            parts.append(torch.einsum("bqn,bnd->bqd", similar.softmax(-1), v[..., head]))
        return torch.cat(parts, -1)

    def weighted(name, x):
        gate = linear(f"attn1.gate_{name}.2", silu(linear(f"attn1.gate_{name}.0", x)))
        return linear(f"attn1.to_v_{name}", x) / (1 + (-gate).exp())

    V, T = stream("visual", h), stream("text", e)
    q = w["query_tokens"].expand(len(V), -1, -1)
    queries, v, text = linear("attn1.to_q", rms("attn1.norm_q", q)), rms("attn1.norm_v", V), rms("attn1.norm_t", T)
    both = attention(queries, linear("attn1.to_k_vis", v), weighted("vis", v))
    both = both + attention(queries, linear("attn1.to_k_text", text), weighted("text", text))
    q = q + linear("attn1.to_out.0", both)
    queries, v = linear("attn2.to_q", rms("attn2.norm_q", q)), rms("attn2.norm_v", V)
    q = q + linear("attn2.to_out.0", attention(queries, linear("attn2.to_k_vis", v), linear("attn2.to_v_vis", v)))
    x = linear("ff.0", rms("norm_ff", q))
    q = q + linear("ff.2", x * (1 + torch.erf(x / math.sqrt(2))) / 2)
    return linear("head", q).mean((1, 2))


def test_the_score_is_the_published_formula(published):
    """On weights of the published names, with dual attention: hooks on the whole network, and matrix products."""
    R = load_reward_model(published, 64)
    torch.manual_seed(1)
    z_t, t, prompts = torch.randn(3, 4, 16, 16), torch.tensor([900.0, 500.0, 20.0]), ["a red circle", "a ring", ""]
    c = load_encoder("toy/sd3", 64).encode(prompts)
    head = torch.load(published / "checkpoint" / "rm_head.pt", weights_only=True)
    expected = score_by_hand(head, *tokens_by_hooks(published, z_t, t, c))
    with torch.no_grad():
        torch.testing.assert_close(R(z_t, t, c), expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(R.score(z_t, t, prompts), expected, atol=2e-5, rtol=2e-5)
        finished = R.score_finished(z_t, prompts, batch=2)
        eps = torch.stack([torch.randn(4, 16, 16, generator=g) for g in sample_generators(0, 0, range(3), "finished")])
        at_level = R(0.6 * z_t + 0.4 * eps, torch.full((3,), 400.0), c)
    torch.testing.assert_close(finished, at_level, atol=2e-5, rtol=2e-5)
    assert expected.std() > 0.1


def test_full_size_geometry():
    """SD3.5-Medium's: 87 tensors and 139 M in the head, 288 and 28 M in the LoRA."""
    with torch.device("meta"):
        head = dina_lrm.Head(1536, 3).state_dict()
        net = SD3Transformer2DModel(num_layers=13, num_attention_heads=24, dual_attention_layers=tuple(range(12)))
        net = get_peft_model(FirstBlocks(net, 12), LoraConfig(r=64, target_modules=dina_lrm.LAYERS))
    assert {name: tuple(p.shape) for name, p in head.items()} == head_shapes(1536, 3) and len(head) == 87
    lora = [p for name, p in net.named_parameters() if "lora_" in name]
    assert len(lora) == 288
    assert [round(sum(p.numel() for p in part) / 1e6) for part in (head.values(), lora)] == [139, 28]


@pytest.mark.parametrize(
    "part, change, line",
    [
        ("head", lambda w: w.pop("attn1.norm_t.weight"), "rm_head.pt.*norm_t"),
        ("head", lambda w: w.update({"attn1.proj_in.weight": torch.zeros(1)}), "rm_head.pt.*proj_in"),
        ("head", lambda w: w.update({"head.weight": torch.zeros(1, 7)}), "rm_head.pt.*7"),
        ("head", lambda w: w["head.bias"].fill_(math.nan), "nan or inf"),
        ("lora", lambda w: w.pop(next(k for k in w if ".2.attn.to_add_out.lora_B" in k)), "backbone_lora.*1 keys"),
        (
            "lora",
            lambda w: w.update({k.replace("blocks.0", "blocks.9"): w[k].clone() for k in list(w)}),
            "backbone_lora.*blocks.9",
        ),
        ("config", lambda c: c.update(use_logistic=True), "use_logistic True is not supported"),
        ("config", lambda c: c["reward_head"].update(width=64), "width 64 is not supported"),
        ("config", lambda c: c.update(text_head_idx=[]), "text_head_idx"),
        ("config", lambda c: c.update(num_transformer_layers=12), "visual_head_idx"),
        (
            "config",
            lambda c: c.update(visual_head_idx=[7], text_head_idx=[7], num_transformer_layers=7),
            "7 is too deep",
        ),
        ("config", dict.clear, "visual_head_idx None"),
    ],
)
def test_another_model_than_the_published_one_is_refused(part, change, line, published, tmp_path):
    """Nothing is left out or filled with random numbers: each ends in one line that names the file."""
    path = tmp_path / "dina"
    shutil.copytree(published, path, ignore=shutil.ignore_patterns("backbone"))
    (path / "backbone").symlink_to(published / "backbone")
    file = path / {"head": reward_layout.HEAD, "lora": f"{reward_layout.LORA}/adapter_model.safetensors"}.get(part, "")
    if part == "head":
        weights = torch.load(file, weights_only=True)
        change(weights)
        torch.save(weights, file)
    elif part == "lora":
        weights = load_file(file)
        change(weights)
        save_file(weights, file)
    else:
        config = json.loads(json.dumps(PUBLISHED))
        change(config)
        (path / "config.json").write_text(json.dumps({"model": config}))
    with pytest.raises(UserError, match=line) as e:
        load_reward_model(path, 64)
    assert "\n" not in str(e.value)


def folder_of(tmp_path, base, name, part, **changes):
    """A copy of a toy's folder, by links, with changes to the config.json of a part."""
    copy = tmp_path / name
    copy.mkdir()
    for file in Path(base).resolve().iterdir():
        if file.name != part:
            (copy / file.name).symlink_to(file)
    shutil.copytree(Path(base) / part, copy / part)
    path = copy / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


def test_a_reward_model_of_other_latents_is_refused(tmp_path):
    """Before torch is needed, by stage 2, DMDR, --watch and evaluate.py, and nothing is written."""
    wide = folder_of(tmp_path, "toy/sd3", "wide", "vae", latent_channels=16)
    config = json.loads((wide / "transformer" / "config.json").read_text()) | {"in_channels": 16, "out_channels": 16}
    (wide / "transformer").unlink()
    shutil.copytree("toy/sd3/transformer", wide / "transformer")
    (wide / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    (tmp_path / "prompts.txt").write_text("a ring\n")
    dmdr = "--method dmdr"
    watch = f"--watch {tmp_path}/prompts.txt"
    cases = [
        ("toy/sd3", "toy/lrm", "scores SDXL's latents, toy/sd3 is SD3's: name one of DiNa-LRM's layout"),
        ("toy/sdxl", "toy/sd3_lrm", "scores SD3's latents, toy/sdxl is SDXL's: name one of LPO's layout"),
        (wide, "toy/sd3_lrm", "scores latents of 4 channels, those of .*wide have 16"),
        (wide, "", f"no latent reward model in {tmp_path}/sd3_lrm: name its folder with --reward"),
        ("toy/sd3", tmp_path / "empty", "neither unet/ of LPO's layout nor checkpoint/ of DiNa-LRM's layout"),
    ]
    for model, named, line in cases:
        flags = f"--model {model} --out {tmp_path}/run" + (f" --reward {named}" if named else "")
        for extra in [dmdr, watch] if named else [dmdr]:
            with pytest.raises(UserError, match=line):
                run_folder.look(train.read(f"{flags} {extra}".split()))
        with pytest.raises(UserError, match=line):
            reward_layout.reward_folder(train.read(f"{flags} --stage 2".split()))
        if named:
            with pytest.raises(UserError, match=line):
                evaluate.check(evaluate.flags(f"--teacher --model {model} --reward {named}".split()))
    assert not (tmp_path / "run").exists()


def test_what_is_saved_reads_back(small_toys, tmp_path):
    """The LoRA is merged at lora_alpha / r, the backbone found from anywhere, the text encoders shared."""
    model = small_toys["sd3"]
    torch.manual_seed(0)
    R = untrained_reward_model(model, 64)
    for p in R.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    save_reward_model(R, tmp_path / "lrm", model)
    encoder = load_encoder(model, 64)
    again = load_reward_model(tmp_path / "lrm", 64, encoder=encoder)
    z_t, t, prompts = torch.randn(2, 4, 16, 16), torch.tensor([900.0, 100.0]), ["a ring", "a red cross"]
    with torch.no_grad():
        scores = R.score(z_t, t, prompts)
        torch.testing.assert_close(again.score(z_t, t, prompts), scores, atol=1e-5, rtol=1e-5)
    assert again.encoder.encoders is encoder.encoders
    assert load_reward_model("toy/sd3_lrm", 64, encoder=encoder).encoder.encoders is not encoder.encoders
    assert dina_lrm.found_from_anywhere(HERE / "toy" / "sd3") == "toy/sd3"
    written = "".join(p.read_text() for p in (tmp_path / "lrm").rglob("*.json"))
    assert re.findall(r'"(/[^"]*)"', written) == [str(Path(model).resolve())]


def test_stage_2_and_dmdr_on_sd3(small_toys, tmp_path):
    """With the reward model beside the model: preference, distillation, resumed; DMDR's gradient through R."""
    few = f"--model {small_toys['sd3']} --batch-size 2 --gan-weight 0 --preview-every 0 --log-every 1"
    first = train.train(train.read(f"{few} --iterations 1 --out {tmp_path}/one".split()))
    flags = f"{few} --stage 2 --init {first} --rl-ratio 1 --rl-lr 1e-4 --pair-threshold 0 --out {tmp_path}/two"
    run = train.train(train.read(f"{flags} --iterations 2".split()))
    run = train.train(train.read(f"{flags} --iterations 3 --resume".split()))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [("rl_loss" in m, "dm_loss" in m) for m in logged] == [(True, False), (False, True), (True, False)]
    assert logged[0]["rl_loss"] == pytest.approx(math.log(2), rel=1e-4) and logged[0]["kl_to_reference"] == 0
    assert logged[0]["reward_gap"] > 0 < logged[2]["kl_to_reference"] and logged[2]["skipped_updates"] == 0
    assert json.loads((run / "config.json").read_text())["reward"] == reward_layout.beside(small_toys["sd3"])

    few = few.replace("--gan-weight 0 ", "")
    run = train.train(
        train.read(f"{few} --method dmdr --dynamic 0 --ttur 1 --iterations 1 --out {tmp_path}/dmdr".split())
    )
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["reward"] != 0


def test_the_toys_reward_model_ranks_held_out_pairs():
    """What toy.build reports, on fewer pairs: at the levels of stage 2's candidates and at little noise."""
    better, worse, captions, _ = reward.pairs(128, "test")
    R, schedule = load_reward_model("toy/sd3_lrm", 64), load_schedule("toy/sd3")
    c = R.encoder.encode(captions)
    torch.manual_seed(0)
    for t, bar in ((50, 0.8), (500, 0.8), (750, 0.7)):
        with torch.no_grad():
            win, lose = pair_scores(
                R, schedule, better, worse, torch.full((128,), t), *torch.randn(2, *better.shape), c
            )
        assert (win > lose).float().mean() >= bar, t


def test_sharded_over_two_ranks(two_ranks):
    """FSDP2 on the transformer, as in stage 2: the scores of one process, with gradient to z_t too."""
    two_ranks("""
import torch
from engine.distributed import shard
from engine.reward_model import backbone, load_reward_model

scores = []
for sharded in (False, True):
    R = load_reward_model("toy/sd3_lrm", 64)
    if sharded:
        shard(backbone(R), torch.float32)
    z_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    score = R.score(z_t, torch.tensor([900.0, 500.0]), ["a ring", "a red cross"])
    (slope,) = torch.autograd.grad(score.sum(), z_t)
    scores.append((score.detach(), slope))
torch.testing.assert_close(*scores)
""")
