"""SDXL or SD3-Medium at its real size with random weights, as a pipeline folder, and a SAM ViT-B checkpoint.

They show speed and memory without downloads:

    python -m lab.random_models sdxl OUT      OUT/sdxl (7 GB, bf16) and OUT/sam_vit_b_random.pth; sd3: 15 GB, with T5
    python train.py --preset sdxl-4step --model OUT/sdxl --sam OUT/sam_vit_b_random.pth --clip toy/clip --data pictures
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from segment_anything import sam_model_registry
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from diffusion import Schedule
from engine.folders import HERE
from engine.pictures import to_pil
from engine.real_size import CLIP_G, CLIP_L, SD3, SD3_VAE, SDXL, SDXL_VAE, T5_XXL


def write(kind, out):
    """Write folder out/kind ("sdxl" or "sd3") and the SAM checkpoint -> their paths. The tokenizers are the toy's."""
    out = Path(out)
    words = lambda: CLIPTokenizer.from_pretrained(HERE / "toy/clip", model_max_length=77)  # noqa: E731
    parts = {"tokenizer": words(), "tokenizer_2": words()}
    before = torch.get_default_dtype()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a GPU draws them in a second
        sam = sam_model_registry["vit_b"]().cpu()
        torch.set_default_dtype(torch.bfloat16)
        try:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIP_G)
            if kind == "sdxl":
                parts |= {"unet": UNet2DConditionModel(**SDXL), "vae": AutoencoderKL(**SDXL_VAE)}
                parts["text_encoder"] = CLIPTextModel(CLIP_L)
            else:
                parts |= {"transformer": SD3Transformer2DModel(**SD3), "vae": AutoencoderKL(**SD3_VAE)}
                parts |= {"text_encoder": CLIPTextModelWithProjection(CLIP_L), "text_encoder_3": T5EncoderModel(T5_XXL)}
        finally:
            torch.set_default_dtype(before)
    if kind == "sdxl":
        s = Schedule()
        betas = {"beta_start": s.beta_start, "beta_end": s.beta_end, "beta_schedule": "scaled_linear"}
        pipeline = StableDiffusionXLPipeline(scheduler=EulerDiscreteScheduler(**betas), **parts)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        words = T5TokenizerFast(model_max_length=512)
        pipeline = StableDiffusion3Pipeline(scheduler=scheduler, tokenizer_3=words, **parts)
    pipeline.to(torch.bfloat16).save_pretrained(out / kind)
    torch.save(sam.state_dict(), out / "sam_vit_b_random.pth")
    return out / kind, out / "sam_vit_b_random.pth"


def pictures(folder, side, n=4):
    """A folder of n random square pictures with captions, as --data takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a picture"}) + "\n" for i in range(n)]
    for i in range(n):
        to_pil(torch.rand(3, side, side) * 2 - 1).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text("".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=("sdxl", "sd3"))
    parser.add_argument("out")
    args = parser.parse_args()
    print("{} and {}".format(*write(args.kind, args.out)))


if __name__ == "__main__":
    main()
