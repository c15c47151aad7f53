"""Latent reward and preference optimisation (Flash-DMD 3.4, 6; Eq. 12 and 13).

    Eq. 12   L_rl = -E [ log σ(β H) ]
    Eq. 13   H(w, l) = log p_θ(z^w|z_t)/p_ref(z^w|z_t) - log p_θ(z^l|z_t)/p_ref(z^l|z_t)
    p        one step of the LCM scheduler: z_s = α_s G(z_t, t) + σ_s ε, so log p(z_s|z_t) = -||z_s - α_s G(z_t, t)||²/2σ_s² + const

    z_t, z_s  noisy latents of one student step and of the next, (B, C, h, w)
    z^w, z^l  of k candidates z_s drawn from ONE z_t, the one that the reward model R likes best, and least
    θ, ref    the generator, and the frozen stage-1 student it started from
    R(z_s, s, prompt)   the latent reward model: a score of a NOISY latent, no decoding

First half: R, in the architecture and the folder layout of "Diffusion Model as a Noise-Aware Latent Reward Model for
Step-Level Preference Optimization" (LPO, arXiv 2502.01051; its SDXL model is the paper's). Second half: Eq. 12, 13.
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from diffusion import add_noise, renoise, times
from models import PromptEncoder, UserError, folder, load_part

# ------------------------------------------------------------------------------------ the reward model


class LatentRewardModel(nn.Module):
    """R(z_t, t, c) -> (B,): how well a noisy latent fits its prompt, and how good it looks. Any SDXL-shaped UNet.

    The denoising UNet without its up blocks is the eye. Four of its features, averaged over space: the last residual output
    of each down block before its downsampler, and the mid block's; joined (SDXL: 320 + 640 + 1280 + 1280 = 3520) and
    projected to the width of the pooled text embedding. R = exp(logit_scale) cos(feature, text).
    Only the mid feature is guided: uncond + w (cond - uncond), uncond from the empty prompt through R's own encoders.
    """

    guidance = 7.5  # w, as LPO publishes it

    def __init__(self, unet, encoder, text_width):
        """unet: a UNet2DConditionModel, whose up blocks are dropped; encoder: a PromptEncoder, R's own; text_width: of its pooled embedding."""
        super().__init__()
        unet.up_blocks = unet.conv_norm_out = unet.conv_act = unet.conv_out = None
        self.unet, self.encoder, self.empty = unet, encoder, None
        widths = unet.config.block_out_channels
        self.visual_projection = nn.Linear(sum(widths) + widths[-1], text_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1/0.07), CLIP's first guess

    @classmethod
    def from_pipeline(cls, model, image_size, device="cpu"):
        """An untrained one, fp32: the UNet and the text encoders of pipeline folder `model`, the projection at random."""
        encoder = PromptEncoder(model, image_size, device)
        unet = load_part(UNet2DConditionModel, folder(model, "unet"), "unet", low_cpu_mem_usage=False).float()
        return cls(unet, encoder, encoder.encoders[1].config.projection_dim).to(device)

    @classmethod
    def from_pretrained(cls, path, image_size, tokenizers=None, device="cpu", dtype=torch.float32):
        """A folder with unet/, text_encoder/, text_encoder_2/ and state_dict.pt ({"visual_projection": {"weight"}, "logit_scale"}).

        tokenizers: the pipeline folder whose tokenizers to use where this one has none. Raises UserError for what is missing or unreadable.
        """
        where = Path(folder(path, "unet", "text_encoder", "text_encoder_2", "state_dict.pt", hub=False))
        words = where if (where / "tokenizer").exists() else tokenizers
        unet = load_part(UNet2DConditionModel, str(where), "unet", low_cpu_mem_usage=False)
        encoder = PromptEncoder(str(where), image_size, device, dtype, tokenizers=words)
        R = cls(unet, encoder, encoder.encoders[1].config.projection_dim)
        try:
            state = torch.load(where / "state_dict.pt", map_location="cpu", weights_only=True)
            R.visual_projection.load_state_dict(state["visual_projection"])
            R.logit_scale.data = torch.as_tensor(state["logit_scale"]).float()
        except Exception as e:  # of another width, of other keys, cut short, pickled objects: torch has an error of its own for each
            raise UserError(f"cannot read state_dict.pt of {path}: {str(e).strip().splitlines()[-1].strip()}") from None
        return R.to(device, dtype).eval().requires_grad_(False)

    def save_pretrained(self, path, model, half=False):
        """Write the folder that from_pretrained reads; the up blocks, which the layout has and R does not, are those of pipeline `model`."""
        path, dtype = Path(path), torch.float16 if half else torch.float32
        whole = load_part(UNet2DConditionModel, folder(model, "unet"), "unet", low_cpu_mem_usage=False)
        whole.load_state_dict(whole.state_dict() | {k: v.cpu() for k, v in self.unet.state_dict().items()})
        (whole.half() if half else whole.float()).save_pretrained(path / "unet")
        for name, net in zip(("text_encoder", "text_encoder_2"), self.encoder.encoders):
            copy.deepcopy(net).to("cpu", dtype).save_pretrained(path / name)
        weight = {"weight": self.visual_projection.weight.detach().to("cpu", dtype)}
        torch.save({"visual_projection": weight, "logit_scale": self.logit_scale.item()}, path / "state_dict.pt")

    def features(self, z_t, t, c):
        """The three down blocks' features and the mid block's, averaged over space: four (B, channels)."""
        unet, dtype = self.unet, self.visual_projection.weight.dtype
        added = {"text_embeds": c["pooled"].to(dtype), "time_ids": c["size"].to(dtype)}
        tokens = c["tokens"].to(dtype)
        emb = unet.get_time_embed(z_t.to(dtype), t)
        emb = unet.time_embedding(emb) + unet.get_aug_embed(emb, tokens, added)
        x, found = unet.conv_in(z_t.to(dtype)), []
        for block in unet.down_blocks:
            x, outputs = block(x, emb, encoder_hidden_states=tokens) if getattr(block, "has_cross_attention", False) else block(x, emb)
            found.append(outputs[-1 if block.downsamplers is None else -2].mean((2, 3)))
        mid = unet.mid_block(x, emb, encoder_hidden_states=tokens)
        return [*found, mid.mean((2, 3))]

    def forward(self, z_t, t, c):
        """z_t (B, C, h, w) at timesteps t (B,); c the prompts' condition through R's own encoders -> scores (B,), fp32."""
        if self.empty is None:  # R's text encoders never learn
            self.empty = self.encoder.encode([""])
        null = {k: v.expand_as(c[k]) for k, v in self.empty.items()}
        *down, mid = self.features(z_t, t, c)
        mid_null = self.features(z_t, t, null)[-1]
        joined = torch.cat([*down, mid_null + self.guidance * (mid - mid_null)], 1)
        return self.logit_scale.float().exp() * F.cosine_similarity(self.visual_projection(joined).float(), c["pooled"].float())

    def score(self, z_t, t, prompts):
        """R(z_t, t, prompt), (B,), of B prompts as strings."""
        return self(z_t, t, self.encoder.encode(prompts))

    @torch.no_grad()
    def judge(self, x_0, prompts, batch=128):
        """R of finished, clean latents x_0 (N, C, h, w), at t = 1: (N,) on the CPU."""
        parts = [(x_0[i : i + batch], prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        return torch.cat([self.score(x, torch.ones(len(x), dtype=torch.long, device=x.device), p).cpu() for x, p in parts])


def pair_scores(R, schedule, win, lose, t, eps_win, eps_lose, c):
    """R of both latents of every pair, noised to the pair's one t (B,) with noise of their own; latents, noise (B, C, h, w). (B,), (B,)."""
    t = t.repeat(2)
    z_t = add_noise(schedule, torch.cat([win, lose]), t, torch.cat([eps_win, eps_lose]))
    return R(z_t, t, {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in c.items()}).chunk(2)


def bradley_terry(score_win, score_lose):
    """-log σ(R(z^w) - R(z^l)), the mean over pairs: what R is trained with. Scalar."""
    return -F.logsigmoid(score_win - score_lose).mean()


# ------------------------------------------------------------------------------ preference optimisation


def log_density(z_s, x_0, alpha_s, sigma_s):
    """log p(z_s|z_t) = -||z_s - α_s x_0||²/2σ_s² + const, the LCM scheduler's transition; x_0 = G(z_t, t). (B,)."""
    return -(z_s - alpha_s * x_0).square().flatten(1).sum(1) / (2 * sigma_s.flatten() ** 2)


def advantage(z_win, z_lose, x0_theta, x0_ref, alpha_s, sigma_s, clip=0.0):
    """Eq. 13: H = <z^w - z^l, α_s (x0_θ - x0_ref)>/σ_s², (B,): what the four log densities come to when z_t is shared.

    clip > 0: LPO's way, the ratio of each MEAN density, (p_θ/p_ref)^(1/numbers), held within 1 ± clip; past it a candidate moves nothing.

    z_win, z_lose, x0_theta, x0_ref (B, C, h, w); alpha_s, sigma_s (B, 1, 1, 1). A SUM over dimensions, as densities have it:
    LPO takes the mean, so its β = 500 at SDXL's 65,536 dimensions is β = 0.0076 here.
    """
    if clip:
        n, middle, apart = z_win[0].numel(), alpha_s * (x0_theta + x0_ref) / 2, alpha_s * (x0_theta - x0_ref) / sigma_s**2
        ratios = [((z - middle) * apart).flatten(1).sum(1) for z in (z_win, z_lose)]  # log p_θ/p_ref
        win, lose = (r.clamp(n * math.log(1 - clip), n * math.log(1 + clip)) for r in ratios)
        return win - lose
    return ((z_win - z_lose) * alpha_s * (x0_theta - x0_ref) / sigma_s**2).flatten(1).sum(1)


def loss(H, beta):
    """Eq. 12: -log σ(β H) per pair, (B,). The mean, over kept pairs, is taken in train.py: it runs over all ranks."""
    return -F.logsigmoid(beta * H)


def choose(scores, threshold):
    """Best and worst of k candidates: scores (B, k) -> win (B,), lose (B,), kept (B,) bool.

    Kept where the softmax over the two extremes is further apart than `threshold` (LPO: 0.45 to 0.6, score gaps 0.97 to 1.39).
    """
    win, lose = scores.argmax(1), scores.argmin(1)
    gap = (scores.amax(1) - scores.amin(1)).float()
    return win, lose, (gap / 2).tanh() > threshold


@torch.no_grad()
def rollout(G, R, z, c, c_R, S, rl_steps, k, carry, generators):
    """Algorithm 1, lines 28-29: at each step k candidates from one z_t, judged by R at THEIR level s.

    z (B, C, h, w): noise at S[0]; c, c_R: conditions of G and of R; rl_steps: how many steps, from the noisiest, are judged.
    carry: "random" or "best", the candidate that the next step starts from (ASSUMPTION: random, as in LPO).
    Returns one (i, z_t, candidates (B, k, C, h, w), scores (B, k)) per step. NOTE: LPO gives R the level t of z_t.
    """
    pool, z_t, rows = [], z, torch.arange(len(z), device=z.device)
    many = {key: v.repeat_interleave(k, 0) for key, v in c_R.items()}
    for i in range(rl_steps):
        x_0 = G(z_t, times(S[i], z_t), c)
        z_s = torch.stack([renoise(G.schedule, x_0, S, i + 1, generators) for _ in range(k)], 1)  # (B, k, C, h, w)
        scores = R(z_s.flatten(0, 1), times(S[i + 1], z_s.flatten(0, 1)), many).view(-1, k)
        pool.append((i, z_t, z_s, scores))
        chosen = scores.argmax(1) if carry == "best" else torch.zeros_like(rows)  # all k are alike before R looks
        z_t = z_s[rows, chosen]
    return pool
