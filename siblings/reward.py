"""DMDR's reward beside the DM loss, L = L_DMD + w L_rl, and its two branches.

    backprop   L_rl = E max(0, m - R(x_s))              gradient through R and the one step x = G_θ(x_τ, τ)
    grpo       L_rl = -E [ A log π_θ ], A from R(x_0)   siblings/policy.py: rollouts in groups; R needs no gradient

    R        the latent reward model, or CLIP's score of the picture; w, m: --reward-weight, --reward-margin
    x_s      x noised to the next student step s, for the latent reward model; x itself for CLIP.
             The last step has no next: s is that step itself, and with one step t = 1
    x_0      the end of the rollout, of which x_τ is a state

ASSUMPTION: GRPO's loss is not public. Ours rewards x_0 alone, and every transition of the rollout has its A.
NOTE: x_s takes the DM loss's noise.
"""

import torch

from diffusion import add_noise, times
from siblings import policy


def reward_loss(reward, x, margin):
    """E max(0, m - R(x)) -> scalar, scores (B,).

    x (B, C, h, w) with gradient; reward: x -> scores (B,), differentiable.
    """
    scores = reward(x)
    return (margin - scores).clamp(min=0).mean(), scores.detach()


def reward_at(nets, batch, i, eps):
    """R as a function of the clean estimate x at student step i: CLIP's score of the picture, or the reward model's.

    The latent reward model sees x noised by eps to the next student step (from the last one, to the last one).
    ASSUMPTION: with one step, whose noise hides x, it sees x at t = 1, where it scores finished latents.
    """
    if nets.config.reward == "clip":
        return lambda x: finished_reward(nets, x, batch.prompts)
    S = nets.S
    s = times(S[min(i + 1, len(S) - 1)] if len(S) > 1 else torch.ones_like(S[0]), eps)
    c_R = nets.R.encoder.encode(batch.prompts)
    return lambda x: nets.R(add_noise(nets.G.schedule, x, s, eps), s, c_R)


def finished_reward(nets, x_0, prompts):
    """R of finished, clean latents x_0 (B, C, h, w) -> (B,)."""
    if nets.config.reward == "clip":
        return nets.R.score(nets.R.features(nets.vae.decode(x_0)), prompts)
    return nets.R.score_finished(x_0, prompts).to(x_0.device)


def reinforce(nets, batch, states):
    """GRPO's backward passes on rollouts in groups -> w L_rl, and {name: value} to log. states: policy.simulate's."""
    config = nets.config
    with torch.no_grad():
        R = finished_reward(nets, states[-1], batch.prompts)
    A = policy.advantages(R[:, None], config.candidates).expand(-1, len(nets.S) - 1)
    w = config.reward_weight
    L_rl = policy.reinforce(nets.G, states, nets.S, batch.c, A, batch.weight * w)
    return w * L_rl, {"rl_loss": L_rl, "reward": R.mean()}
