"""Latent reward and preference optimisation (Flash-DMD 3.4, 6; Eq. 12 and 13).

    Eq. 12   L_rl = -E [ log sigmoid(β H) ]
    Eq. 13   H(w, l) = log p_θ(z^w|z_t)/p_ref(z^w|z_t) - log p_θ(z^l|z_t)/p_ref(z^l|z_t)
    p        one step of the LCM scheduler: z_s = α_s G(z_t, t) + σ_s ε,
             so log p(z_s|z_t) = -||z_s - α_s G(z_t, t)||²/2σ_s² + const

    z_t, z_s  noisy latents of one student step and of the next, (B, C, h, w)
    z^w, z^l  of k candidates z_s drawn from ONE z_t, those with the highest and the lowest score of R
    θ, ref    the generator, and the frozen stage-1 student it started from
    R(z_s, s, prompt)   the latent reward model: a score of a NOISY latent, without decoding

First half: R, in the architecture of "Diffusion Model as a Noise-Aware Latent Reward Model for Step-Level Preference
Optimization" (LPO, arXiv 2502.01051; Flash-DMD uses its SDXL model). Second half: Eq. 12, 13.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import add_noise, noise_to_step, times

# ------------------------------------------------------------------------------------ the reward model


class LatentRewardModel(nn.Module):
    """R(z_t, t, c) -> (B,): how well a noisy latent fits its prompt, and how good it looks. Any SDXL-shaped UNet.

    The denoising UNet without its up blocks extracts features: the last residual output of each down block before its
    downsampler, and the mid block's output. They are averaged over space, joined (SDXL: 320 + 640 + 1280 + 1280 = 3520)
    and projected to the width of the pooled text embedding. R = exp(logit_scale) cos(feature, text).
    Only the mid feature is guided: uncond + w (cond - uncond), uncond from the empty prompt through R's own encoders.
    """

    guidance = 7.5  # w, as LPO publishes it

    def __init__(self, unet, encoder, text_width):
        """unet: diffusers' UNet2DConditionModel, whose up blocks are dropped here.

        encoder: R's own, encode(prompts) -> tokens, pooled, size; text_width: of its pooled embedding.
        """
        super().__init__()
        unet.up_blocks = unet.conv_norm_out = unet.conv_act = unet.conv_out = None
        self.unet = unet
        self.encoder = encoder
        self.empty = None  # the empty prompt's condition, once it is needed
        widths = unet.config.block_out_channels
        self.visual_projection = nn.Linear(sum(widths) + widths[-1], text_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1/0.07), CLIP's first guess

    def features(self, z_t, t, c):
        """The three down blocks' features and the mid block's, averaged over space: four (B, channels)."""
        unet = self.unet
        dtype = self.visual_projection.weight.dtype
        added = {"text_embeds": c["pooled"].to(dtype), "time_ids": c["size"].to(dtype)}
        tokens = c["tokens"].to(dtype)
        emb = unet.get_time_embed(z_t.to(dtype), t)
        emb = unet.time_embedding(emb) + unet.get_aug_embed(emb, tokens, added)
        x = unet.conv_in(z_t.to(dtype))
        found = []
        for block in unet.down_blocks:
            attends = {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}
            x, outputs = block(x, emb, **attends)
            found.append(outputs[-1 if block.downsamplers is None else -2].mean((2, 3)))
        mid = unet.mid_block(x, emb, encoder_hidden_states=tokens)
        return [*found, mid.mean((2, 3))]

    def forward(self, z_t, t, c):
        """z_t (B, C, h, w) at t (B,); c: the prompts' condition from R's own encoders -> scores (B,), fp32."""
        if self.empty is None:  # R's text encoders are never trained
            self.empty = self.encoder.encode([""])
        null = {k: v.expand_as(c[k]) for k, v in self.empty.items()}
        *down, mid = self.features(z_t, t, c)
        mid_null = self.features(z_t, t, null)[-1]
        joined = torch.cat([*down, mid_null + self.guidance * (mid - mid_null)], 1)
        cosine = F.cosine_similarity(self.visual_projection(joined).float(), c["pooled"].float())
        return self.logit_scale.float().exp() * cosine

    def score(self, z_t, t, prompts):
        """R(z_t, t, prompt), (B,), of B prompts as strings."""
        return self(z_t, t, self.encoder.encode(prompts))

    @torch.no_grad()
    def score_finished(self, x_0, prompts, batch=128):
        """R of finished, clean latents x_0 (N, C, h, w), at t = 1: (N,) on the CPU."""
        scores = []
        for i in range(0, len(prompts), batch):
            x = x_0[i : i + batch]
            t = torch.ones(len(x), dtype=torch.long, device=x.device)
            scores.append(self.score(x, t, prompts[i : i + batch]).cpu())
        return torch.cat(scores)


def pair_scores(R, schedule, win, lose, t, eps_win, eps_lose, c):
    """R of both latents of every pair, noised to the same t, each with its own noise -> scores (B,), (B,).

    win, lose, eps_win, eps_lose (B, C, h, w); t (B,); c: the prompts' condition.
    """
    t = t.repeat(2)
    z_t = add_noise(schedule, torch.cat([win, lose]), t, torch.cat([eps_win, eps_lose]))
    both = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in c.items()}
    return R(z_t, t, both).chunk(2)


def bradley_terry(score_win, score_lose):
    """-log σ(R(z^w) - R(z^l)), the mean over pairs: R's training loss. Scalar."""
    return -F.logsigmoid(score_win - score_lose).mean()


# ------------------------------------------------------------------------------ preference optimisation


def log_ratio_margin(z_win, z_lose, x0_theta, x0_ref, alpha_s, sigma_s, clip=0.0):
    """Eq. 13: H = <z^w - z^l, α_s (x0_θ - x0_ref)>/σ_s², (B,): how much more than the reference θ prefers z^w.

    The four log densities reduce to this because both candidates come from one z_t. z_win, z_lose, x0_theta, x0_ref
    (B, C, h, w); alpha_s, sigma_s (B, 1, 1, 1). H is a SUM over dimensions, as log densities are; LPO takes the mean:
    its β = 500 at SDXL's 65,536 dimensions is β = 0.0076 here.
    clip > 0: as in LPO, each ratio of MEAN densities, (p_θ/p_ref)^(1/dimensions), is clipped to 1 ± clip.
    """
    if clip:
        n = z_win[0].numel()
        apart = alpha_s * (x0_theta - x0_ref) / sigma_s**2
        middle = alpha_s * (x0_theta + x0_ref) / 2
        low = n * math.log(1 - clip)
        high = n * math.log(1 + clip)
        log_ratio = lambda z: ((z - middle) * apart).flatten(1).sum(1).clamp(low, high)  # noqa: E731  log p_θ/p_ref
        return log_ratio(z_win) - log_ratio(z_lose)
    return ((z_win - z_lose) * alpha_s * (x0_theta - x0_ref) / sigma_s**2).flatten(1).sum(1)


def loss(H, beta):
    """Eq. 12: -log sigmoid(β H) per pair, (B,). train.py takes the mean over the kept pairs of all ranks."""
    return -F.logsigmoid(beta * H)


def pair_terms(G, ref, z_t, z_win, z_lose, t, s, c, clip=0.0):
    """Eq. 13 of pairs drawn from z_t at t, at level s -> H (B,), and the KL divergence of G from ref (a scalar).

    z_t, z_win, z_lose (B, C, h, w); t, s: scalars of S. The divergence is that of a transition, a mean over dimensions.
    """
    t = times(t, z_t)
    s = times(s, z_t)
    alpha_s = G.schedule.alpha(s)
    sigma_s = G.schedule.sigma(s)
    x0_theta = G(z_t, t, c)
    with torch.no_grad():
        x0_ref = ref(z_t, t, c)
    H = log_ratio_margin(z_win, z_lose, x0_theta, x0_ref, alpha_s, sigma_s, clip)
    kl = (alpha_s * (x0_theta - x0_ref) / sigma_s).detach().square().mean() / 2
    return H, kl


def agrees(H):
    """Whether θ prefers z^w by more than rounding, 10^-3 nats: at the reference H is 0 up to rounding. (B,) bool."""
    return H > 1e-3


def choose(scores, threshold):
    """Best and worst of k candidates: scores (B, k) -> win (B,), lose (B,), kept (B,) bool.

    A pair is kept where the softmax over its two scores is further apart than `threshold` (LPO: 0.45 to 0.6, that is
    score gaps of 0.97 to 1.39).
    """
    win = scores.argmax(1)
    lose = scores.argmin(1)
    gap = (scores.amax(1) - scores.amin(1)).float()
    return win, lose, (gap / 2).tanh() > threshold


@torch.no_grad()
def rollout(G, R, z, c, c_R, S, transitions, k, carry, generators):
    """Algorithm 1, lines 28-29: at each step k candidates from one z_t, scored by R at THEIR level s.

    z (B, C, h, w): noise at S[0]; c, c_R: conditions of G and of R; transitions: how many steps, noisiest first.
    carry: "random" or "best", the candidate that the next step starts from (ASSUMPTION: random, as in LPO).
    Returns one (i, z_t, candidates (B, k, C, h, w), scores (B, k)) per step. NOTE: LPO gives R the level t of z_t.
    """
    steps = []
    z_t = z
    rows = torch.arange(len(z), device=z.device)
    c_many = {key: v.repeat_interleave(k, 0) for key, v in c_R.items()}
    for i in range(transitions):
        x_0 = G(z_t, times(S[i], z_t), c)
        z_s = [noise_to_step(G.schedule, x_0, S, i + 1, generators) for _ in range(k)]
        z_s = torch.stack(z_s, 1)  # (B, k, C, h, w)
        flat = z_s.flatten(0, 1)
        scores = R(flat, times(S[i + 1], flat), c_many).view(-1, k)
        steps.append((i, z_t, z_s, scores))
        # "random" takes the first candidate: all are draws from one distribution
        chosen = scores.argmax(1) if carry == "best" else torch.zeros_like(rows)
        z_t = z_s[rows, chosen]
    return steps
