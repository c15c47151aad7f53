"""Features of picture files, for diversity and for distances to real pictures: DINOv2's, and Inception's for FID."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModel

from engine import metrics
from engine.errors import UserError
from engine.folders import first_line, folder
from engine.models import load_part

SIDE = 224  # pixels, of DINOv2's input; pictures are squashed to it, bicubic, as FD-DINOv2 is defined
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Dino:
    """A DINOv2 (or DINOv3) folder or hub name: picture files -> its pooled output."""

    column = "fd_dino"

    def __init__(self, path, device="cpu"):
        """Raises UserError for a network of another kind."""
        where = folder(path)
        kind = load_part(AutoConfig, where).model_type
        if not kind.startswith("dino"):
            raise UserError(f"--features {path} is a {kind}: give a DINOv2, such as facebook/dinov2-large")
        self.model = load_part(AutoModel, where).float().to(device).eval().requires_grad_(False)
        self.device = torch.device(device)

    def read(self, path):
        """A picture file -> (3, SIDE, SIDE), normalised."""
        with Image.open(path) as file:
            image = file.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255 - mean) / std

    def embed(self, pixels):
        return self.model(pixel_values=pixels).pooler_output


class Inception:
    """The Inception network of FID by the package torch-fidelity, from its weights file: picture files -> pool3."""

    column = "fid"

    def __init__(self, path, device="cpu"):
        """path: pt_inception-2015-12-05-6726825d.pth. Raises UserError."""
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise UserError("FID needs the package torch-fidelity: pip install torch-fidelity") from None
        if not Path(path).is_file():
            raise UserError(f"--features {path}: no such file (torch-fidelity's Inception weights)")
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # the package would run what a pickle says
            net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        except Exception as e:  # torch.load's and load_state_dict's
            raise UserError(f"cannot read Inception's weights in {path}: {first_line(e)}") from None
        self.model = net.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)

    def read(self, path):
        """A picture file -> (3, H, W), bytes; the network resizes."""
        with Image.open(path) as file:
            return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)

    def embed(self, pixels):
        return self.model(pixels)[0]


def encoder(path, device="cpu"):
    """Inception for a weights file, else Dino."""
    return (Inception if str(path).endswith((".pth", ".pt")) else Dino)(path, device)


@torch.no_grad()
def features(encode, files, bar="features", batch=32):
    """Picture files -> (N, d) on the CPU, fp32."""
    found = []
    same_size = lambda images: all(image.shape == images[0].shape for image in images)  # noqa: E731
    for first in tqdm(range(0, len(files), batch), desc=bar, disable=not bar):
        images = [encode.read(path) for path in files[first : first + batch]]
        groups = [torch.stack(images)] if same_size(images) else [image[None] for image in images]
        found += [encode.embed(group.to(encode.device)).float().cpu() for group in groups]
    return torch.cat(found)


def reference(encode, path, bar="real pictures"):
    """Real pictures -> (features or None, mean, covariance): of a folder, or of saved statistics (.npz: mu, sigma).

    Raises UserError.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
        if len(files) < 2:
            raise UserError(f"--real {path} holds {len(files)} pictures ({', '.join(PICTURES)})")
        found = features(encode, files, bar)
        return found, *metrics.gaussian(found)
    try:
        with np.load(path) as saved:
            mean, covariance = (torch.from_numpy(saved[name]).double() for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"--real {path}: {first_line(e)} (a folder of pictures, or .npz with mu and sigma)") from None
    return None, mean, covariance


def distances(encode, found, real):
    """Features (N, d) and `reference` -> {"fd_dino" or "fid", and for a folder "precision", "recall" by DINO}."""
    real_features, mean, covariance = real
    if len(mean) != found.shape[1]:
        raise UserError(f"--real has features of {len(mean)} numbers, --features of {found.shape[1]}")
    values = {encode.column: metrics.frechet_of(*metrics.gaussian(found), mean, covariance)}
    if real_features is not None and encode.column == "fd_dino" and min(len(found), len(real_features)) > 3:
        values["precision"], values["recall"] = metrics.precision_recall(found, real_features)
    return values
