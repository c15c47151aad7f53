"""A latent reward model of flow latents, R(z_t, t, c), in DiNa-LRM's shape and published layout (arXiv 2602.11146).

    τ                               SD3's embedding of t and of the pooled text
    h_i, e_i                        its picture tokens and text tokens after block i, for i = 4, 8, 12 of 24
    y_i = P (x_i (1 + γ) + β + l)   x_i = h_i or e_i; (γ, β) = MLP(τ); P, MLP and l: a block's and a stream's own
    V = W_v [y_i of h_i],  T = W_t [y_i of e_i]
    q = q + O (A(q, V) + A(q, T))   four learned queries q; A: softmax attention of 8 heads, a token's value weighted by
    q = q + O A(q, V)               sigmoid(MLP(token)); then once more, V alone, without these weights
    q = q + MLP(q)                  all inputs of attentions and of this MLP pass an RMS norm
    R = mean over q of w q + b      published as (R + 10)/10; here as it is

    config.json                     "model": the backbone, its depths, the head's sizes (engine/reward_layout.py)
    checkpoint/backbone_lora/       peft: a LoRA on the attention of the backbone's first half, at twice B A
    checkpoint/rm_head.pt           the head's state dict

The text states are SD3's; T5's have length 128. A student's z_t goes in as it is, with its own t.
NOTE: DiNa-LRM is trained with P(w beats l) = Φ((R_w - R_l)/sqrt(2 (2 s² + 0.05))), s = t/1000, and one noise for both
latents of a pair; --stage reward has Bradley-Terry and two.
"""

import copy
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion import randn, sample_generators
from engine.errors import UserError
from engine.folders import HERE, first_line, folder
from engine.models import check_finite, load_part
from engine.prompts import load_encoder
from engine.reward_layout import HEAD, LORA, backbone, settings
from engine.sd3 import t5_of

TEXT_LENGTH = 128  # of T5's states
FINISHED = 0.4  # s, the noise level at which generated pictures are scored, as published
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def mlp(width, hidden, out, activation=nn.SiLU):
    return nn.Sequential(nn.Linear(width, hidden), activation(), nn.Linear(hidden, out))


def zeroed(net):
    """`net` with its last layer at zero."""
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return net


class Adapter(nn.Module):
    """y = P (x (1 + γ) + β + l), (γ, β) = MLP(τ). x (B, n, width), τ (B, width) -> (B, n, width / 4)."""

    def __init__(self, width):
        super().__init__()
        self.layer_embed = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.cond_mlp = zeroed(mlp(width, 2 * width, 2 * width))
        self.proj = nn.Linear(width, width // 4)

    def forward(self, x, temb):
        gamma, beta = self.cond_mlp(temb)[:, None].chunk(2, -1)
        return self.proj(x * (1 + gamma) + beta + self.layer_embed)


class Attention(nn.Module):
    """q + O (A(q, V) + A(q, T)), values weighted; without `text` q + O A(q, V), unweighted. (B, queries, width)."""

    def __init__(self, width, heads, text):
        super().__init__()
        self.heads = heads
        self.text = text
        self.norm_q = nn.RMSNorm(width)
        self.to_q = nn.Linear(width, width)
        self.norm_v = nn.RMSNorm(width)
        self.to_k_vis = nn.Linear(width, width)
        self.to_v_vis = nn.Linear(width, width)
        if text:
            self.norm_t = nn.RMSNorm(width)
            self.to_k_text = nn.Linear(width, width)
            self.to_v_text = nn.Linear(width, width)
            self.gate_vis = zeroed(mlp(width, width, 1))
            self.gate_text = zeroed(mlp(width, width, 1))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, q, V, T=None):
        queries = self.to_q(self.norm_q(q))
        V = self.norm_v(V)
        values = self.to_v_vis(V)
        if not self.text:
            return q + self.to_out(self.attend(queries, self.to_k_vis(V), values))
        T = self.norm_t(T)
        seen = self.attend(queries, self.to_k_vis(V), values * self.gate_vis(V).sigmoid())
        read = self.attend(queries, self.to_k_text(T), self.to_v_text(T) * self.gate_text(T).sigmoid())
        return q + self.to_out(seen + read)

    def attend(self, *qkv):
        """Softmax attention of q (B, queries, width) to k, v (B, n, width) -> (B, queries, width)."""
        split = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in qkv]  # (B, heads, n, width / heads)
        return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class Head(nn.Module):
    """From tokens and τ to R. Parameters have the names of rm_head.pt."""

    def __init__(self, width, depths, queries=4, heads=8):
        super().__init__()
        self.layer_adapters_visual = nn.ModuleList(Adapter(width) for _ in range(depths))
        self.layer_adapters_text = nn.ModuleList(Adapter(width) for _ in range(depths))
        self.agg_visual = nn.Linear(depths * (width // 4), width)
        self.agg_text = nn.Linear(depths * (width // 4), width)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, queries, width))
        self.attn1 = Attention(width, heads, text=True)
        self.attn2 = Attention(width, heads, text=False)
        self.norm_ff = nn.RMSNorm(width)
        self.ff = mlp(width, 4 * width, width, nn.GELU)
        self.head = nn.Linear(width, 1)

    def forward(self, h, e, temb):
        """h, e: picture and text tokens per depth, (B, n, width) each; temb (B, width) -> R (B,)."""
        V = self.agg_visual(torch.cat([adapt(x, temb) for adapt, x in zip(self.layer_adapters_visual, h)], -1))
        T = self.agg_text(torch.cat([adapt(x, temb) for adapt, x in zip(self.layer_adapters_text, e)], -1))
        q = self.query_tokens.expand(len(V), -1, -1)
        q = self.attn1(q, V, T)
        q = self.attn2(q, V)
        q = q + self.ff(self.norm_ff(q))
        return self.head(q).mean((1, 2))


class DinaRewardModel(nn.Module):
    """R(z_t, t, c) -> (B,), with latent_reward.LatentRewardModel's interface. Any SD3-shaped transformer."""

    def __init__(self, transformer, encoder, depths, **sizes):
        """transformer: diffusers' SD3Transformer2DModel, cut to depths[-1] blocks, or peft's wrapper of it.

        encoder: of prompts, with T5's states at TEXT_LENGTH; depths: the blocks whose tokens are read, counted from 1;
        sizes: the head's.
        """
        super().__init__()
        self.transformer = transformer
        self.encoder = encoder
        self.depths = depths
        self.reward_head = Head(transformer.inner_dim, len(depths), **sizes)

    def features(self, z_t, t, c):
        """-> picture tokens and text tokens after the blocks at `depths`, and τ (B, width)."""
        net = self.transformer
        dtype = self.reward_head.agg_visual.weight.dtype
        checkpointed = net.gradient_checkpointing and torch.is_grad_enabled()
        temb = net.time_text_embed(t, c["pooled"].to(dtype))
        h = net.pos_embed(z_t.to(dtype))
        e = net.context_embedder(c["tokens"].to(dtype))
        seen = []
        read = []
        for n, block in enumerate(net.transformer_blocks, 1):
            run = partial(net._gradient_checkpointing_func, block) if checkpointed else block
            e, h = run(h, e, temb)
            if n in self.depths:
                seen.append(h)
                read.append(e)
        return seen, read, temb

    def forward(self, z_t, t, c):
        """z_t (B, C, h, w) at t (B,); c: the prompts' condition from R's own encoder -> scores (B,), fp32."""
        return self.reward_head(*self.features(z_t, t, c)).float()

    def score(self, z_t, t, prompts):
        """R(z_t, t, prompt), (B,), of B prompts as strings."""
        return self(z_t, t, self.encoder.encode(prompts))

    @torch.no_grad()
    def score_finished(self, x_0, prompts, batch=128):
        """R of finished, clean latents x_0 (N, C, h, w), noised to level 0.4: (N,) on the CPU.

        The n-th latent has the same noise at every call.
        """
        scores = []
        for i in range(0, len(prompts), batch):
            x = x_0[i : i + batch]
            eps = randn(sample_generators(0, 0, range(i, i + len(x)), "finished"), x)
            t = torch.full((len(x),), 1000 * FINISHED, device=x.device)
            z_t = (1 - FINISHED) * x + FINISHED * eps
            scores.append(self.score(z_t, t, prompts[i : i + batch]).cpu())
        return torch.cat(scores)


def first_blocks(model, n=None):
    """The transformer of pipeline `model`, fp32, frozen, cut after n blocks (by default half of them)."""
    net = load_part(SD3Transformer2DModel, folder(model, "transformer"), "transformer", low_cpu_mem_usage=False).float()
    net.transformer_blocks = net.transformer_blocks[: n or len(net.transformer_blocks) // 2]
    net.norm_out = net.proj_out = None
    return net.requires_grad_(False)


def text_encoder(model, image_size, device, dtype=torch.float32, shared=None):
    """The prompt encoder of pipeline `model`, at R's text length; `shared`'s networks, where they are loaded and its.

    A run without T5 (--t5 off) has not all of them.
    """
    if shared is None or not shared.encoders or folder(shared.model) != folder(model):
        return load_encoder(model, image_size, device, dtype, text_length=TEXT_LENGTH)
    if t5_of(model, "") == "on" and not shared.text_length:
        return load_encoder(model, image_size, device, dtype, text_length=TEXT_LENGTH)
    encoder = copy.copy(shared)
    encoder.text_length = TEXT_LENGTH if shared.text_length else 0
    return encoder


def untrained(model, image_size, device="cpu"):
    """An untrained R on pipeline `model`, fp32: a LoRA on the first half of its blocks, and a random head.

    It reads the tokens after 1/6, 1/3 and 1/2 of the blocks, as DiNa-LRM does. The LoRA's rank is 64, as there, or a
    sixth of a small transformer's width.
    """
    net = first_blocks(model)
    n = len(net.transformer_blocks)
    rank = min(64, net.inner_dim // 6)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LAYERS, init_lora_weights="gaussian")
    depths = sorted({max(1, n * third // 3) for third in (1, 2, 3)})
    return DinaRewardModel(get_peft_model(net, lora), text_encoder(model, image_size, device), depths).to(device)


def load(path, image_size, device="cpu", dtype=torch.float32, encoder=None):
    """R from a folder in the published layout, frozen, in `dtype`, its LoRA merged.

    encoder: a pipeline's, whose networks are used where it is the backbone's. Raises UserError for a part that is
    missing, unreadable or of another shape.
    """
    where = Path(folder(path, hub=False))
    model = backbone(path)
    found = settings(path)
    depths = found["visual_head_idx"]
    sizes = {"num_queries": "queries", "num_attn_heads": "heads"}
    sizes = {sizes[k]: v for k, v in found.get("reward_head", {}).items() if k in sizes}
    net = first_blocks(model, depths[-1])
    try:
        net = merged(net, where / LORA)
    except Exception as e:  # peft, safetensors and torch each raise their own
        raise UserError(f"cannot read {LORA} of {path}: {first_line(e)}") from None
    R = DinaRewardModel(net, text_encoder(model, image_size, device, dtype, encoder), depths, **sizes)
    try:
        R.reward_head.load_state_dict(torch.load(where / HEAD, map_location="cpu", weights_only=True))
    except Exception as e:  # other keys or widths, a torn file, pickled objects
        raise UserError(f"cannot read {HEAD} of {path}: {str(e).strip().splitlines()[-1].strip()}") from None
    check_finite(R, f"the reward model in {path}")
    return R.to(device, dtype).eval().requires_grad_(False)


def merged(net, path):
    """`net` with a peft folder's LoRA added to its weights, at lora_alpha / r. Raises for keys that do not match."""
    wrapped = get_peft_model(net, PeftConfig.from_pretrained(path))
    result = set_peft_model_state_dict(wrapped, load_file(path / "adapter_model.safetensors"))
    other = [*result.unexpected_keys, *(k for k in result.missing_keys if "lora_" in k)]
    if other:
        raise UserError(f"{len(other)} keys do not match the backbone's layers, first {other[0]}")
    return wrapped.merge_and_unload()


def save(R, path, model, half=False):
    """Write an R from `untrained` as the folder that load reads, in fp32 or fp16 (half). model: its pipeline."""
    path = Path(path)
    dtype = torch.float16 if half else torch.float32
    cpu = lambda state: {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}  # noqa: E731
    lora = R.transformer.peft_config["default"]
    (path / LORA).mkdir(parents=True, exist_ok=True)
    lora.save_pretrained(path / LORA)
    save_file(cpu(get_peft_model_state_dict(R.transformer)), path / LORA / "adapter_model.safetensors")
    torch.save(cpu(R.reward_head.state_dict()), path / HEAD)
    head = {"use_proj_in": False, "width": -1, "out_dim": 1, "num_queries": R.reward_head.query_tokens.shape[1]}
    config = {
        "model_type": "bt",
        "backbone_model_id": found_from_anywhere(model),
        "num_transformer_layers": R.depths[-1],
        "freeze_backbone": False,
        "use_lora": True,
        "use_text_features": True,
        "lora_config": {"r": lora.r, "lora_alpha": lora.lora_alpha, "init_lora_weights": "gaussian"},
        "use_logistic": False,
        "visual_head_idx": R.depths,
        "text_head_idx": R.depths,
        "use_t_embed": True,
        "reward_head": {**head, "num_attn_heads": R.reward_head.attn1.heads, "dropout": 0.0},
    }
    (path / "config.json").write_text(json.dumps({"model": config}, indent=2) + "\n")


def found_from_anywhere(model):
    """A pipeline folder as a path that does not depend on the working directory; a hub name unchanged."""
    where = Path(folder(model))
    if not where.is_dir():
        return str(model)
    where = where.resolve()
    return str(where.relative_to(HERE.resolve())) if where.is_relative_to(HERE.resolve()) else str(where)
