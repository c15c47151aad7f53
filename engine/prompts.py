"""Prompts -> conditions: the frozen text encoders of a base model.

A condition c is a dict of tensors, batch first: tokens (B, L, D), pooled (B, P), and SDXL's size (B, 6). The prompts of
a batch have one length L. A model whose prompts differ in length has `mask` (B, L) too, bool, False at the padding;
diffusion.batched pads.
"""

import hashlib
import sys
from pathlib import Path

import torch
import transformers

from engine.base_model import family_of
from engine.folders import folder, on_disk
from engine.models import load_part

ENDS = 2**20  # bytes at both ends of a file that stand for its content


class PromptEncoder:
    """The frozen text encoders of a base model. encode(prompts) -> c."""

    kept = None  # prompts -> their condition without sizes, of a cache (engine/text_cache.py), in place of the encoders
    tokenizers = encoders = ()  # before load() and after unload()

    def __init__(
        self, model, image_size, device="cpu", dtype=torch.float32, tokenizers=None, loaded=True, family=None, **text
    ):
        """tokenizers: another folder to take the tokenizers from; loaded: False leaves them and the encoders to load().

        family: the base model, where `model` is no pipeline folder; text: its settings of text. Raises UserError where
        a part cannot be read.
        """
        self.family = family or family_of(model)
        path = folder(model, *self.family.TEXT)
        words = folder(tokenizers or model, *self.family.TOKENIZERS)
        parts, settings = self.family.words(model, **text)
        self.parts = {name: (cls, words if name.startswith("tokenizer") else path) for name, cls in parts.items()}
        self.settings = tuple(settings)  # names of attributes, beside the parts what conditions depend on
        vars(self).update(settings)
        self.model = model
        self.size = image_size
        self.device = device
        self.dtype = dtype
        self.read = self.cut = 0  # prompts so far
        if loaded:
            self.load()

    def made(self, kind=""):
        """Tokenizers and encoders, {folder: part}, of the type that they are stored in. kind: "tokenizer" = those."""
        names = [name for name in self.parts if name.startswith(kind)]
        return {
            name: load_part(getattr(transformers, self.parts[name][0]), self.parts[name][1], name) for name in names
        }

    def load(self):
        """Load tokenizers and encoders."""
        made = self.made()
        self.tokenizers = [part for name, part in made.items() if name.startswith("tokenizer")]
        self.encoders = [part for name, part in made.items() if name.startswith("text")]
        for encoder in self.encoders:
            overflows = self.dtype == torch.float16 and not isinstance(encoder, transformers.CLIPPreTrainedModel)
            encoder.to(self.device, torch.bfloat16 if overflows else self.dtype).eval().requires_grad_(False)

    def unload(self):
        """Drop tokenizers and encoders, and give their memory back."""
        self.tokenizers = self.encoders = ()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def identity(self):
        """What the conditions depend on beside prompts and sizes, as JSON takes it: files by their size and ends."""
        parts = {name: fingerprint(Path(on_disk(path, name)[0], name)) for name, (_, path) in self.parts.items()}
        settings = {name: getattr(self, name) for name in self.settings}
        return {"kind": self.family.NAME, "dtype": str(self.dtype), "parts": parts} | settings

    def encode(self, prompts, sizes=None):
        """prompts: B strings; sizes (B, 6) of the pictures (engine/data.py), by default those of an uncropped square.

        Prompts that are longer than the encoders take are cut off: a warning counts them, at the 1st, 10th, 100th ...
        """
        if self.kept:
            c = self.kept(prompts)
        else:
            self.count(prompts)
            c = self.text(prompts)
        if not self.family.SIZES:
            return c
        if sizes is None:
            square = [self.size, self.size, 0, 0, self.size, self.size]
            sizes = torch.tensor(square, dtype=torch.float32).expand(len(prompts), 6)
        return c | {"size": sizes.to(self.device)}

    @torch.no_grad()
    def text(self, prompts):
        """The condition of B strings, without sizes."""
        return self.family.text(self, prompts)

    def clip(self, prompts):
        """The first two encoders, CLIPs: penultimate states side by side (B, L, d1 + d2), and pooled outputs."""
        states = []
        pooled = []
        for tokenizer, encoder in zip(self.tokenizers[:2], self.encoders[:2]):
            out = encoder(self.ids(tokenizer, prompts, tokenizer.model_max_length), output_hidden_states=True)
            states.append(out.hidden_states[-2])
            if isinstance(encoder, transformers.CLIPTextModelWithProjection):
                pooled.append(out[0])  # SDXL: only the second encoder's
        return {"tokens": torch.cat(states, -1).float(), "pooled": torch.cat(pooled, -1).float()}

    def ids(self, tokenizer, prompts, length):
        """The words' numbers, cut or padded to one length: (B, length)."""
        fixed = {"padding": "max_length", "max_length": length, "truncation": True}
        return tokenizer(list(prompts), **fixed, return_tensors="pt").input_ids.to(self.device)

    def too_long(self, prompts):
        """Those of the prompts that have more tokens than are read."""
        most = self.family.longest(self)
        return [prompt for prompt, n in zip(prompts, self.family.lengths(self, prompts)) if n > most]

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
        length = self.family.longest(self)
        line = f"warning: {cut} of {of} are cut off after {length} tokens, one of them: {example[:60]!r} ..."
        print(line, file=sys.stderr)

    def null(self):
        """The null prompt's condition, batch of one: encoded, or zeros, but for sizes, where the model wants those."""
        c = self.encode([self.family.EMPTY])
        if self.family.null_is_zero(self.model):
            return {k: v if k == "size" else torch.zeros_like(v) for k, v in c.items()}
        return c


def load_encoder(model, image_size, device="cpu", dtype=torch.float32, t5="", text_length=256, loaded=True):
    """The prompt encoder of pipeline folder `model`. t5, text_length: SD3's. loaded: False leaves it to .load()."""
    return PromptEncoder(model, image_size, device, dtype, loaded=loaded, t5=t5, text_length=text_length)


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
