"""Metrics of pictures: Fréchet distance, precision and recall, CLIP score, saturation, contrast, diversity.

Images are (N, 3, H, W) in [-1, 1]; features (N, d).
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from engine.folders import folder
from engine.models import load_part


class Clip:
    """A CLIP folder (toy/clip) or hub name: images -> features, (images, prompts) -> CLIP scores."""

    def __init__(self, path, device="cpu"):
        path = folder(path)
        self.device = torch.device(device)
        self.model = load_part(CLIPModel, path).float().to(device).eval().requires_grad_(False)
        self.tokenizer = load_part(CLIPTokenizer, path)
        config = Path(path) / "preprocessor_config.json"
        pixels = json.loads(config.read_text()) if config.exists() else {}
        mean = pixels.get("image_mean", [0.48145466, 0.4578275, 0.40821073])
        std = pixels.get("image_std", [0.26862954, 0.26130258, 0.27577711])
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)

    def features(self, images):
        """The projected image embeddings, not normalised, (N, d), with gradient to the images."""
        size = self.model.config.vision_config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        pixels = ((images + 1) / 2 - self.mean) / self.std
        return self.embed(pixels)

    def embed(self, pixels):
        """CLIP's own input (N, 3, side, side) -> the projected image embeddings, not normalised, (N, d)."""
        return torch.cat([self.model.visual_projection(self.model.vision_model(p)[1]) for p in pixels.split(256)])

    def embed_text(self, texts):
        """Texts -> their projected embeddings, not normalised, (N, d)."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        return self.model.text_projection(self.model.text_model(**tokens)[1])

    def score(self, features, prompts):
        """CLIP scores (N,): the cosine of image features (N, d) with those of their N prompts."""
        return F.cosine_similarity(features, self.embed_text(prompts))


def frechet(a, b):
    """Fréchet distance of two Gaussians fitted to features a (N, d), b (M, d):

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a^½ Σ_b Σ_a^½)^½)   (Heusel et al. 2017, on these features).
    """
    return frechet_of(*gaussian(a), *gaussian(b))


def gaussian(features):
    """Features (N, d) -> their mean (d,) and covariance (d, d), fp64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_of(mean_a, cov_a, mean_b, cov_b):
    """The Fréchet distance of two Gaussians; means (d,), covariances (d, d), fp64."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def precision_recall(fake, real, k=3):
    """k-NN precision and recall (Kynkäänniemi et al. 2019) of features fake (N, d) against real (M, d).

    Precision: the fraction of fakes inside the union of balls around reals, each ball's radius the distance to its k-th
    neighbour. Recall: the same with fakes and reals exchanged.
    """

    def covered(points, centres):
        radius = torch.cdist(centres, centres).kthvalue(k + 1, 1).values  # the first neighbour is the point itself
        return (torch.cdist(points, centres) <= radius).any(1).float().mean().item()

    return covered(fake, real), covered(real, fake)


def saturation(images):
    """Mean over pixels of max(R, G, B) - min(R, G, B), with channels in [0, 1]."""
    return ((images.amax(1) - images.amin(1)) / 2).mean().item()


def contrast(images):
    """Mean over pictures of the standard deviation of their luminance, with channels in [0, 1]."""
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(3, 1, 1)
    return ((images + 1) / 2 * luma).sum(1).flatten(1).std(1).mean().item()


def diversity(images, per_prompt):
    """Root mean squared difference between pictures of one prompt, channels in [0, 1].

    images: groups of `per_prompt` in a row, (groups x per_prompt, 3, H, W) in [-1, 1].
    """
    groups = ((images + 1) / 2).flatten(1).unflatten(0, (-1, per_prompt))
    pairs = torch.triu_indices(per_prompt, per_prompt, 1)
    return (groups[:, pairs[0]] - groups[:, pairs[1]]).square().mean().sqrt().item()


def cosine_diversity(features, per_prompt):
    """D = 1 - 2/(N(N-1)) Σ_{i<j} cos(f_i, f_j) of each prompt's N >= 2 pictures, unbiased -> (groups,), fp64.

    features: groups of N = `per_prompt` >= 2 in a row, (groups x N, d). The sum of the cosines is
    (‖Σ_i f_i/‖f_i‖‖² - N) / 2.
    """
    n = per_prompt
    sums = F.normalize(features.double(), dim=-1).unflatten(0, (-1, n)).sum(1)
    return 1 - (sums.square().sum(-1) - n) / (n * (n - 1))


def mean_and_error(values):
    """The mean of a tensor (N,) and its standard error, None for a single value."""
    error = (values.double().std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return values.double().mean().item(), error
