"""Prompts -> conditions: SDXL's and SD3's frozen text encoders.

A condition c is a dict of tensors, batch first: tokens (B, L, D), pooled (B, P), and SDXL's size (B, 6). The prompts of
a batch have one length L. A model whose prompts differ in length has `mask` (B, L) too, bool, False at the padding;
diffusion.batched pads.
"""

import hashlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from engine import base_model
from engine.folders import folder, index_of, on_disk, part_of, read_json
from engine.models import load_part

ENDS = 2**20  # bytes at both ends of a file that stand for its content


class PromptEncoder:
    """SDXL's two frozen text encoders. encode(prompts) -> c: tokens (B, L, d1 + d2), pooled (B, p), size (B, 6)."""

    classes = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
    sized = True  # whether sizes are part of c
    kept = None  # prompts -> tokens and pooled, of a cache (engine/text_cache.py), in place of the encoders
    tokenizers = encoders = ()  # before load() and after unload()

    def __init__(self, model, image_size, device="cpu", dtype=torch.float32, tokenizers=None, loaded=True):
        """tokenizers: another folder to take the tokenizers from; loaded: False leaves them and the encoders to load().

        Raises UserError where one cannot be read.
        """
        path = folder(model, "text_encoder", "text_encoder_2")
        words = folder(tokenizers or model, "tokenizer", "tokenizer_2")
        self.parts = {f"tokenizer{n}": (CLIPTokenizer, words) for n in self.classes}
        self.parts |= {f"text_encoder{n}": (cls, path) for n, cls in self.classes.items()}
        self.model = model
        self.size = image_size
        self.device = device
        self.dtype = dtype
        self.read = self.cut = 0  # prompts so far
        if loaded:
            self.load()

    def load(self):
        """Load tokenizers and encoders."""
        made = {name: load_part(cls, path, name) for name, (cls, path) in self.parts.items()}
        self.tokenizers = [part for name, part in made.items() if name.startswith("tokenizer")]
        self.encoders = [part for name, part in made.items() if name.startswith("text")]
        for encoder in self.encoders:
            overflows = self.dtype == torch.float16 and isinstance(encoder, T5EncoderModel)
            encoder.to(self.device, torch.bfloat16 if overflows else self.dtype).eval().requires_grad_(False)

    def unload(self):
        """Drop tokenizers and encoders, and give their memory back."""
        self.tokenizers = self.encoders = ()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def identity(self):
        """What the conditions depend on beside prompts and sizes, as JSON takes it: files by their size and ends."""
        parts = {name: fingerprint(Path(on_disk(path, name)[0], name)) for name, (_, path) in self.parts.items()}
        return {"kind": type(self).__name__, "dtype": str(self.dtype), "parts": parts}

    def encode(self, prompts, sizes=None):
        """prompts: B strings; sizes (B, 6) of the pictures (engine/data.py), by default those of an uncropped square.

        Prompts that are longer than the encoders take are cut off: a warning counts them, at the 1st, 10th, 100th ...
        """
        if self.kept:
            c = self.kept(prompts)
        else:
            self.count(prompts)
            c = self.text(prompts)
        if not self.sized:
            return c
        if sizes is None:
            square = [self.size, self.size, 0, 0, self.size, self.size]
            sizes = torch.tensor(square, dtype=torch.float32).expand(len(prompts), 6)
        return c | {"size": sizes.to(self.device)}

    @torch.no_grad()
    def text(self, prompts):
        """tokens and pooled of B strings."""
        states = []
        pooled = []
        for tokenizer, encoder in zip(self.tokenizers[:2], self.encoders[:2]):
            out = encoder(self.ids(tokenizer, prompts, tokenizer.model_max_length), output_hidden_states=True)
            states.append(out.hidden_states[-2])
            if isinstance(encoder, CLIPTextModelWithProjection):
                pooled.append(out[0])  # SDXL: only the second encoder's
        return {"tokens": torch.cat(states, -1).float(), "pooled": torch.cat(pooled, -1).float()}

    def ids(self, tokenizer, prompts, length):
        """The words' numbers, cut or padded to one length: (B, length)."""
        fixed = {"padding": "max_length", "max_length": length, "truncation": True}
        return tokenizer(list(prompts), **fixed, return_tensors="pt").input_ids.to(self.device)

    def longest(self):
        """The tokenizer of the encoder that reads most of a prompt, and how many tokens that is."""
        return self.tokenizers[0], self.tokenizers[0].model_max_length

    def too_long(self, prompts):
        """Those of the prompts that have more tokens than any encoder takes."""
        tokenizer, length = self.longest()
        numbers = tokenizer(list(prompts), verbose=False).input_ids
        return [prompt for prompt, found in zip(prompts, numbers) if len(found) > length]

    def count(self, prompts):
        """Count those that are cut off, and tell of them whenever their number has a digit more."""
        before = self.cut
        cut = self.too_long(prompts)
        self.cut += len(cut)
        self.read += len(prompts)
        if cut and (not before or len(str(self.cut)) > len(str(before))):
            self.warn(self.cut, f"{self.read} prompts so far", cut[0])

    def warn(self, cut, of, example):
        """Tell how many of how many prompts are cut off."""
        length = self.longest()[1]
        line = f"warning: {cut} of {of} are cut off after {length} tokens, one of them: {example[:60]!r} ..."
        print(line, file=sys.stderr)

    def null(self):
        """The null prompt's condition, batch of one: the encoded empty prompt, or zeros where SDXL's index says so."""
        c = self.encode([""])
        if not self.sized or not index_of(self.model).get("force_zeros_for_empty_prompt", True):
            return c
        return {"tokens": torch.zeros_like(c["tokens"]), "pooled": torch.zeros_like(c["pooled"]), "size": c["size"]}


class SD3Encoder(PromptEncoder):
    """SD3's text encoders: encode(prompts) -> tokens (B, L + M, joint), pooled (B, p1 + p2).

    L tokens of the two CLIPs (77), joined along the width and padded with zeros to the transformer's, then M of T5, its
    last state. T5 sees no mask: its states depend on M, which belongs to the student (in diffusers
    `max_sequence_length`). Without T5: L tokens of zeros, as many as CLIP's.
    """

    classes = {"": CLIPTextModelWithProjection, "_2": CLIPTextModelWithProjection}
    sized = False

    def __init__(self, model, image_size, device="cpu", dtype=torch.float32, t5="", text_length=256, loaded=True):
        """t5: "on", "off", or "" = where the folder has one; text_length: M. Raises UserError for "on" without T5."""
        super().__init__(model, image_size, device, dtype, loaded=False)
        self.width = read_json(model, "transformer/config.json")["joint_attention_dim"]
        self.text_length = text_length if base_model.t5_of(model, t5) == "on" else 0
        if self.text_length:
            path = folder(model)
            self.parts |= {"tokenizer_3": (T5TokenizerFast, path), "text_encoder_3": (T5EncoderModel, path)}
        if loaded:
            self.load()

    def identity(self):
        return super().identity() | {"width": self.width, "text_length": self.text_length}

    @torch.no_grad()
    def text(self, prompts):
        c = super().text(prompts)
        tokens = F.pad(c["tokens"], (0, self.width - c["tokens"].shape[-1]))
        more = torch.zeros_like(tokens)
        if self.text_length:
            more = self.encoders[2](self.ids(self.tokenizers[2], prompts, self.text_length))[0].float()
        return {"tokens": torch.cat([tokens, more], 1), "pooled": c["pooled"]}

    def longest(self):
        """T5's where there is one: that CLIP reads 77 tokens of a long prompt is as it should be."""
        return (self.tokenizers[2], self.text_length) if self.text_length else super().longest()


def load_encoder(model, image_size, device="cpu", dtype=torch.float32, t5="", text_length=256, loaded=True):
    """The prompt encoder of pipeline folder `model`. t5, text_length: SD3's. loaded: False leaves it to .load()."""
    if part_of(model) == "unet":
        return PromptEncoder(model, image_size, device, dtype, loaded=loaded)
    return SD3Encoder(model, image_size, device, dtype, t5, text_length, loaded)


def encoder_of(settings, device="cpu", dtype=torch.float32, model=None, loaded=True):
    """The prompt encoder of a run's settings (a dict), which may lack T5's. model: another pipeline folder."""
    text = {name: settings[name] for name in ("t5", "text_length") if name in settings}
    return load_encoder(model or settings["model"], settings["resolution"], device, dtype, **text, loaded=loaded)


def fingerprint(path):
    """A SHA-1 of the files in a folder: of their names, sizes, first and last MiB."""
    found = hashlib.sha1()
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode("utf-8", "surrogateescape"))
        with file.open("rb") as f:
            found.update(f.read(ENDS))
            f.seek(max(0, size - ENDS))
            found.update(f.read(ENDS))
    return found.hexdigest()
