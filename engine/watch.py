"""Scores of a file of prompts during training, at previews: collapse shows while it happens."""

import torch

from diffusion import guided
from engine import metrics, text, text_cache
from engine.pictures import generate
from engine.reward_model import load_reward_model

PER_PROMPT = 4  # pictures
COLLAPSE = 0.5  # a student's diversity below this part of its teacher's is told


class Watch:
    """CLIP score, diversity and reward of G's pictures for --watch's prompts, several of each, at fixed noise.

    Diversity is metrics.cosine_diversity of CLIP's image features; the teacher's at the same noise stands beside it.
    """

    def __init__(self, nets):
        config = nets.config
        self.nets = nets
        self.prompts = [prompt for prompt in text.prompts(config.watch, "--watch") for _ in range(PER_PROMPT)]
        device = nets.latent.device
        self.clip = metrics.Clip(config.clip, device)
        self.R = nets.R if hasattr(nets.R, "score_finished") else None
        if self.R is None and config.reward not in ("", "clip"):
            self.R = load_reward_model(config.reward, config.resolution, config.model, device)
            if config.cache_text:
                text_cache.fill(self.R.encoder, nets.prompts, config.cache_text)
        teacher = guided(nets.teacher, nets.null, config.teacher_guidance)
        self.teacher = self.diversity(self.clip.features(self.pictures(teacher, 50, ode=True)))
        self.last = None

    def pictures(self, denoiser, steps, ode=False):
        """(prompts x PER_PROMPT, 3, H, W), on the networks' device."""
        nets = self.nets
        images = generate(denoiser, nets.encoder, nets.vae, self.prompts, steps, nets.config.seed, ode=ode)
        return images.to(nets.latent.device)

    def diversity(self, features):
        return metrics.cosine_diversity(features, PER_PROMPT).mean().item()

    @torch.no_grad()
    def look(self, G):
        """-> {"watch_clip_score", "watch_diversity", "watch_diversity_teacher", perhaps "watch_reward"}."""
        images = self.pictures(G, len(self.nets.S))
        features = self.clip.features(images)
        seen = {
            "watch_clip_score": self.clip.score(features, self.prompts).mean().item(),
            "watch_diversity": self.diversity(features),
            "watch_diversity_teacher": self.teacher,
        }
        if self.R:
            seen["watch_reward"] = self.R.score_finished(self.nets.vae.encode(images), self.prompts).mean().item()
        self.last = seen
        return seen

    def warning(self):
        """A line where the last look shows a collapse; else None."""
        diversity, teacher = self.last["watch_diversity"], self.last["watch_diversity_teacher"]
        if diversity >= COLLAPSE * teacher:
            return None
        seen = f"pictures of one prompt differ by {diversity:.3f}, the teacher's by {teacher:.3f}"
        return f"warning: collapse? {seen} (1 - cosine of CLIP features): lower --lr, raise --ttur or lower --guidance"
