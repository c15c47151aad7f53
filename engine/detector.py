"""GenEval's detector, Mask2Former, and its colour classifier, CLIP: pictures -> detections (engine/geneval.py).

The network is fed and read as the benchmark's own detection package does it. transformers' image processor and
post-processing differ: another size, no padding, a cut at 0.5, no boxes and no order.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, CLIPImageProcessorPil, Mask2FormerForUniversalSegmentation

from engine.errors import UserError
from engine.folders import folder
from engine.geneval import CLASSES, COLORS, THRESHOLD, to_color
from engine.models import load_part
from engine.openmmlab import converted

LONG, SHORT = 1333, 800  # the longest long side and the longest short side of the input
MULTIPLE = 32
GREY = 128  # of the padding, before it is normalised
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
KEPT = 100  # detections of a picture
OUTSIDE = (0x99, 0x99, 0x99)  # the colour around an object that CLIP sees


class Detector:
    """A Mask2Former for COCO's instances, in fp32: pictures -> detections."""

    def __init__(self, path, device="cpu"):
        """path: a transformers folder or hub name, or OpenMMLab's checkpoint (.pth). Raises UserError."""
        try:
            import scipy  # noqa: F401, the loss that transformers builds with the network needs it
        except ImportError:
            raise UserError("Mask2Former needs the package scipy: pip install scipy") from None
        if str(path).endswith(".pth"):
            self.model = converted(path)
        else:
            where = folder(path)
            kind = load_part(AutoConfig, where).model_type
            if kind != "mask2former":
                raise UserError(f"--judge {path} is a {kind}: GenEval's detector is a Mask2Former")
            self.model = load_part(Mask2FormerForUniversalSegmentation, where)
        labels = self.model.config.num_labels
        if labels != len(CLASSES):
            raise UserError(f"--judge {path} knows {labels} classes: GenEval needs COCO's {len(CLASSES)} instances")
        self.model = self.model.float().to(device).eval().requires_grad_(False)
        self.device = torch.device(device)

    def __call__(self, image):
        """A PIL image -> at most KEPT detections, best first, each with its "mask": (H, W) bool on the CPU."""
        pixels, size = prepared(image)
        with torch.no_grad(), exact():
            out = self.model(pixel_values=pixels.to(self.device))
        return detections(out.class_queries_logits[0], out.masks_queries_logits[0], pixels.shape[-2:], size, image.size)


class exact:
    """Within it CUDA computes in fp32 to the end: TF32 was seen to lose objects."""

    def __enter__(self):
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_):
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


def prepared(image):
    """A PIL image -> the network's input (1, 3, H, W), and the (height, width) of the picture in its upper left."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)[None]
    sides = pixels.shape[-2:]
    scale = min(LONG / max(sides), SHORT / min(sides))
    size = tuple(int(side * scale + 0.5) for side in sides)
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False).round()
    pixels = F.pad(pixels, (0, -size[1] % MULTIPLE, 0, -size[0] % MULTIPLE), value=GREY)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std, size


def detections(class_logits, mask_logits, padded, size, image_size):
    """The network's output for a picture -> detections, best first.

    class_logits (Q, 81), the last is "nothing"; mask_logits (Q, h, w); padded, size: (height, width) of the input with
    and without padding; image_size: (width, height).
    """
    probability = class_logits.softmax(-1)[:, :-1].flatten()
    best, index = probability.topk(min(KEPT, len(probability)))
    masks = {}  # query -> its mask, how sure it is inside, its box
    found = []
    for p, i in zip(best.tolist(), index.tolist()):
        query = i // len(CLASSES)
        if query not in masks:
            masks[query] = mask_of(mask_logits[query], padded, size, image_size)
        mask, sure, box = masks[query]
        found.append({"class": CLASSES[i % len(CLASSES)], "score": p * sure, "box": box, "mask": mask})
    return sorted(found, key=lambda d: -d["score"])


def mask_of(logits, padded, size, image_size):
    """A query's logits (h, w) -> its mask in the picture (H, W), bool on the CPU, how sure it is there, its box."""
    up = {"mode": "bilinear", "align_corners": False}
    logits = F.interpolate(logits[None, None], tuple(padded), **up)[..., : size[0], : size[1]]
    logits = F.interpolate(logits, image_size[::-1], **up)[0, 0]
    mask = logits > 0
    sure = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
    return mask.cpu(), sure.item(), box_of(mask)


def box_of(mask):
    """(H, W) bool -> [x0, y0, x1, y1] around it, the last pixel included; zeros for an empty one."""
    rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if rows else [0, 0, 0, 0]


class Colors:
    """The colour of an object: CLIP's nearest among geneval.COLORS."""

    def __init__(self, clip):
        """clip: a metrics.Clip."""
        self.clip = clip
        side = clip.model.config.vision_config.image_size
        mean, std = (values.flatten().tolist() for values in (clip.mean, clip.std))
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        self.transform = CLIPImageProcessorPil(**sizes, image_mean=mean, image_std=std)
        self.texts = {}

    def __call__(self, image, detection):
        """The colour's name, of a detection with its mask in a PIL image."""
        pixels = self.transform(cut_out(image, detection), return_tensors="pt")["pixel_values"].to(self.clip.device)
        with torch.no_grad(), exact():
            feature = F.normalize(self.clip.embed(pixels), dim=-1)[0]
        return COLORS[(self.of(detection["class"]) @ feature).argmax()]

    @torch.no_grad()
    def of(self, name):
        """The texts' embeddings of an object's colours: (10, d), each the mean of three texts, normalised."""
        if name not in self.texts:
            templates = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
            texts = [template.format(color, name) for color in COLORS for template in templates]
            features = F.normalize(self.clip.embed_text(texts), dim=-1).unflatten(0, (len(COLORS), -1))
            self.texts[name] = F.normalize(features.mean(1), dim=-1)
        return self.texts[name]


def cut_out(image, detection):
    """A PIL image, grey outside a detection's mask, cut to its box."""
    mask = Image.fromarray(detection["mask"].numpy())
    grey = Image.new("RGB", image.size, OUTSIDE)
    return Image.composite(image.convert("RGB"), grey, mask).crop(detection["box"])


def look(detector, colors, entry, path):
    """A picture file -> the detections that any of GenEval's rules can count, without masks, those that need it with
    "color"."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    found = [d for d in detector(image) if d["score"] > THRESHOLD]
    for detection in to_color(entry, found):
        detection["color"] = colors(image, detection)
    return [{k: v for k, v in d.items() if k != "mask"} for d in found]
