"""The suite runs on the CPU, also where there is a GPU (its exact comparisons are of fp32), and without a network.

For test_gpu.py: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items):
    """Groups first: each runs on one worker, and a long one that begins last is waited for."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


class TwoRanks:
    """Two gloo ranks (tests/ranks.py), started when the first program comes, and again after one that failed."""

    def __init__(self, box):
        self.box, self.process, self.jobs = box, None, 0

    def start(self):
        self.box.mkdir()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        torchrun += ["--shutdown-timeout", "3"]
        path = os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])])
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"}
        log = (self.box / "log").open("w")
        program = [*torchrun, "tests/ranks.py", str(self.box)]
        self.process = subprocess.Popen(program, env=env, stdout=log, stderr=log)

    def run(self, text, folder, patience=300):
        """Run a program on both ranks, `folder` its argument; both must end well."""
        if self.process is None:
            self.box = self.box.with_name(f"{self.box.name}+")
            self.jobs = 0
            self.start()
        n, self.jobs = self.jobs, self.jobs + 1
        (self.box / f"{n}.folder").write_text(str(folder))
        (self.box / "next").write_text(text)
        (self.box / "next").rename(self.box / f"{n}.py")
        outcomes = [self.box / f"{n}.{rank}" for rank in (0, 1)]
        deadline = time.time() + patience
        while not all(path.exists() and path.read_text() for path in outcomes):
            failed = [path.read_text() for path in outcomes if path.exists() and path.read_text() not in ("", "ok")]
            if time.time() > deadline or failed or self.process.poll() is not None:
                self.end()
                pytest.fail("\n".join([*failed, (self.box / "log").read_text()[-3000:]]))
            time.sleep(0.02)
        wrong = [path.read_text() for path in outcomes if path.read_text() != "ok"]
        if wrong:
            self.end()
            pytest.fail(wrong[0])

    def end(self):
        """The ranks leave by themselves; torchrun ends those that hang."""
        if self.process and self.process.poll() is None:
            (self.box / "stop").touch()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.terminate()
                self.process.wait()
        self.process = None


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two ranks for the whole session."""
    two = TwoRanks(tmp_path_factory.mktemp("ranks") / "box")
    yield two
    two.end()


@pytest.fixture
def two_ranks(ranks, tmp_path):
    """A function that runs a program, given as text, on 2 gloo ranks; `folder` in it is tmp_path; it must end well."""
    return lambda text: ranks.run(text, tmp_path)


SMALL = {
    "sdxl": {
        "block_out_channels": [16, 32],
        "attention_head_dim": [2, 2],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 1],
    },
    "sd3": {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 48},
}


@pytest.fixture(scope="session")
def small_toys(tmp_path_factory):
    """The toys with small denoisers of random weights, {"sdxl": folder, "sd3": folder}; a reward model is beside them.

    They are quicker than the trained ones, which amplify rounding, too: in gradients 10,000-fold.
    """
    import diffusers
    import torch

    from engine.base_model import family_of

    folder = tmp_path_factory.mktemp("toy")
    for name in ("lrm", "sd3_lrm"):
        (folder / name).symlink_to(Path("toy", name).resolve())
    for name, changes in SMALL.items():
        family = family_of(f"toy/{name}")
        part, cls = family.PART, getattr(diffusers, family.NETWORK)
        shutil.copytree(f"toy/{name}", folder / name, ignore=shutil.ignore_patterns(part))
        config = dict(cls.load_config(f"toy/{name}/{part}")) | changes
        torch.manual_seed(0)
        cls.from_config(config).save_pretrained(folder / name / part)
    return {name: str(folder / name) for name in SMALL}


@pytest.fixture(scope="session")
def sd3_t5(tmp_path_factory):
    """The folder of a tiny SD3 pipeline with T5."""
    from tiny_models import tiny_sd3

    return tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def base_models(small_toys, sd3_t5, tmp_path_factory):
    """Pipeline folder by base model, all of random weights and for 64 pixels."""
    from tiny_models import tiny_qwen, tiny_sd3, tiny_z_image

    folder = tmp_path_factory.mktemp("base")
    new = {"qwen": tiny_qwen(folder / "qwen"), "z-image": tiny_z_image(folder / "z-image")}
    return {"sdxl": small_toys["sdxl"], "sd3": sd3_t5, "sd35": tiny_sd3(folder / "sd35", sd35=True)} | new


@pytest.fixture(scope="session")
def mask2former(tmp_path_factory):
    """A folder with a small Mask2Former of random weights that sees clocks, and the network."""
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 4}
    sizes |= {"encoder_layers": 2, "decoder_layers": 3, "encoder_feedforward_dim": 48, "dim_feedforward": 64}
    net = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=swin, num_queries=10, num_labels=80, **sizes)
    ).eval()
    for p in net.parameters():  # biases begin at 0 and norms at 1: a swap would not show
        p.data += 0.05 * torch.randn_like(p)
    net.class_predictor.bias.data[74] += 9  # "clock"
    folder = tmp_path_factory.mktemp("mask2former")
    net.save_pretrained(folder)
    return folder, net


@pytest.fixture(scope="session")
def vlm(tmp_path_factory):
    """A folder with a small Qwen3-VL of random weights, its processor and a chat template of our own."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
    )

    folder = tmp_path_factory.mktemp("vlm")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ("Ġ", "yes"), ("Ġ", "no"), ("Y", "e"), ("Ye", "s"), ("N", "o")]
    merges += [("Ġ", "Yes"), ("Ġ", "No")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    tokenizer = Qwen2TokenizerFast(vocab=vocab, merges=merges, extra_special_tokens=special, pad_token=special[0])
    token = tokenizer.convert_tokens_to_ids
    image = Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64)
    video = Qwen2VLVideoProcessor(patch_size=16)
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    Qwen3VLProcessor(image, tokenizer, video, chat_template=template).save_pretrained(folder)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    ids = {f"{name}_token_id": token(f"<|{word}|>") for name, word in [("image", "image_pad"), ("video", "video_pad")]}
    ids |= {f"vision_{end}_token_id": token(f"<|vision_{end}|>") for end in ("start", "end")}
    torch.manual_seed(0)
    net = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)  # else all answers are alike
    net.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def dino(tmp_path_factory):
    """A folder with a small DINOv2 of random weights."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    folder = tmp_path_factory.mktemp("dino")
    net = Dinov2Model(Dinov2Config(**small))
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    net.save_pretrained(folder)
    return str(folder)
