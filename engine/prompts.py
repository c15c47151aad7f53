"""Prompts -> conditions: SDXL's and SD3's frozen text encoders."""

import sys

import torch
import torch.nn.functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from engine.folders import folder, index_of, part_of, read_json
from engine.models import load_part


class PromptEncoder:
    """SDXL's two frozen text encoders. encode(prompts) -> c: tokens (B, L, d1 + d2), pooled (B, p), size (B, 6)."""

    classes = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}

    def __init__(self, model, image_size, device="cpu", dtype=torch.float32, tokenizers=None):
        """tokenizers: another folder to take the tokenizers from."""
        path = folder(model, "text_encoder", "text_encoder_2")
        words = folder(tokenizers or model, "tokenizer", "tokenizer_2")
        self.tokenizers = [load_part(CLIPTokenizer, words, f"tokenizer{n}") for n in ("", "_2")]
        self.encoders = []
        for n, cls in self.classes.items():
            encoder = load_part(cls, path, f"text_encoder{n}").to(device, dtype)
            self.encoders.append(encoder.eval().requires_grad_(False))
        self.model = model
        self.size = image_size
        self.device = device
        self.warned = False

    @torch.no_grad()
    def encode(self, prompts, sizes=None):
        """prompts: B strings; sizes (B, 6) of the pictures (engine/data.py), by default those of an uncropped square.

        Warns, once, of a prompt that is longer than the encoders take.
        """
        long = None if self.warned else next(filter(self.too_long, prompts), None)
        if long is not None:
            self.warned = True
            length = self.tokenizers[0].model_max_length
            line = f"warning: prompts are cut off after {length} tokens, the first of them: {long[:60]!r} ..."
            print(line, file=sys.stderr)
        states = []
        pooled = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            fixed = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            tokens = tokenizer(prompts, **fixed, return_tensors="pt")
            out = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2])
            if isinstance(encoder, CLIPTextModelWithProjection):
                pooled.append(out[0])  # SDXL: only the second encoder's
        if sizes is None:
            square = [self.size, self.size, 0, 0, self.size, self.size]
            sizes = torch.tensor(square, dtype=torch.float32).expand(len(prompts), 6)
        return {
            "tokens": torch.cat(states, -1).float(),
            "pooled": torch.cat(pooled, -1).float(),
            "size": sizes.to(self.device),
        }

    def too_long(self, prompt):
        """Whether `prompt` has more tokens than the encoders take."""
        tokenizer = self.tokenizers[0]
        return len(tokenizer(prompt).input_ids) > tokenizer.model_max_length

    def null(self):
        """The null prompt's condition, batch of one: zeros, or the encoded empty prompt, as the index says."""
        c = self.encode([""])
        if not index_of(self.model).get("force_zeros_for_empty_prompt", True):
            return c
        return {"tokens": torch.zeros_like(c["tokens"]), "pooled": torch.zeros_like(c["pooled"]), "size": c["size"]}


class SD3Encoder(PromptEncoder):
    """SD3's text encoders, without T5: encode(prompts) -> tokens (B, 2 L, joint), pooled (B, p1 + p2).

    The tokens of the two CLIPs are joined along the width and padded with zeros to the transformer's width. L tokens of
    zeros follow, for the missing T5: in diffusers, `max_sequence_length=L` (77).
    """

    classes = {"": CLIPTextModelWithProjection, "_2": CLIPTextModelWithProjection}

    def __init__(self, model, image_size, device="cpu", dtype=torch.float32):
        super().__init__(model, image_size, device, dtype)
        self.width = read_json(model, "transformer/config.json")["joint_attention_dim"]

    def encode(self, prompts, sizes=None):
        """sizes: SDXL's, ignored here."""
        c = super().encode(prompts)
        tokens = F.pad(c["tokens"], (0, self.width - c["tokens"].shape[-1]))
        return {"tokens": torch.cat([tokens, torch.zeros_like(tokens)], 1), "pooled": c["pooled"]}

    def null(self):
        """The encoded empty prompt, batch of one."""
        return self.encode([""])


def load_encoder(model, image_size, device="cpu", dtype=torch.float32):
    """The prompt encoder of pipeline folder `model`."""
    cls = {"unet": PromptEncoder, "transformer": SD3Encoder}[part_of(model)]
    return cls(model, image_size, device, dtype)
