"""SDXL at 1024 without weights: one iteration of each stage, traced end to end on fake tensors (shapes and dtypes, no numbers)."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from segment_anything import sam_model_registry
from test_latent_reward import SDXL
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from config import Config
from diffusion import Schedule, guided, sample_generators
from latent_reward import LatentRewardModel
from models import VAE, Denoiser
from pixel_gan import PixelDiscriminator

SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
B = 2


class Words:
    """SDXL's two text encoders, as far as their shapes go."""

    def encode(self, prompts):
        n = len(prompts)
        return {"tokens": torch.zeros(n, 77, 2048), "pooled": torch.zeros(n, 1280), "size": torch.zeros(n, 6)}


@pytest.fixture
def cast(monkeypatch):
    """SDXL at its own size in bf16, as on a GPU, SAM ViT-B and the reward model; updates only look at the gradients they are handed."""
    moved = {}

    def update(module, optimizer, loss, *rest):
        missing = [name for name, p in module.named_parameters() if p.grad is None or p.grad.shape != p.shape or p.grad.dtype != p.dtype]
        moved[optimizer] = missing
        module.zero_grad(set_to_none=True)
        return loss.detach(), True

    monkeypatch.setattr(train, "update", update)
    with FakeTensorMode(allow_non_fake_inputs=True):
        config, schedule, words = Config(guidance=8.0), Schedule(), Words()
        torch.set_default_dtype(torch.bfloat16)  # weights are born in it: fake ones cannot be cast in place
        teacher, G, fake, ref = (Denoiser(UNet2DConditionModel(**SDXL), schedule, torch.bfloat16) for _ in range(4))
        R = LatentRewardModel(UNet2DConditionModel(**SDXL), words, 1280).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        for frozen in (teacher, ref):
            frozen.net.eval().requires_grad_(False)
        for player in (G, fake):
            player.net.enable_gradient_checkpointing()
        D = PixelDiscriminator(sam_model_registry["vit_b"]().image_encoder.requires_grad_(False), checkpointing=True)
        players = {"G": (G.net, "G"), "fake": (fake.net, "fake"), "D": (D, "D"), "G, RL": (G.net, "G, RL")}
        latent, null = torch.empty(B, 4, 128, 128), words.encode([""])
        S = schedule.steps(4)
        yield (
            train.Cast(config, 1, latent, words, VAE(AutoencoderKL(**SDXL_VAE)), teacher, guided(teacher, null, 8.0), G, fake, D, ref, R, players, S),
            moved,
        )


def draw(purpose):
    return sample_generators(0, 1, range(B), purpose)


def test_stage_1_iteration(cast):
    cast, moved = cast
    logged, stepped, ok = train.distil(cast, 1, torch.zeros(B, 3, 1024, 1024), cast.encoder.encode(["a", "b"]), draw, watched=False)
    assert stepped and ok and {"dm_loss", "adv_loss", "fake_loss", "d_loss"} <= set(logged)
    assert moved == {"G": [], "fake": [], "D": []}  # every weight got a gradient of its own shape


def test_stage_2_iteration(cast):
    cast, moved = cast
    logged, stepped, ok = train.prefer(cast, ["a", "b"], cast.encoder.encode(["a", "b"]), draw)
    assert stepped and ok and logged["rl_loss"].shape == () and moved == {"G, RL": []}
