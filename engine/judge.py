"""DPG-Bench's questions, answered by a vision-language model of transformers instead of the benchmark's mPLUG."""

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from engine.errors import UserError
from engine.folders import first_line, folder
from engine.models import load_part

ASK = "{} Answer yes or no."
YES = ("yes", "Yes", " yes", " Yes")
NO = ("no", "No", " no", " No")


class Judge:
    """Picture and questions -> the probability of "yes" to each, of "yes" or "no" as the answer's first token."""

    def __init__(self, path, device="cpu", batch=8):
        """path: a folder or hub name; batch: questions at once. bf16 on a GPU, fp32 on a CPU. Raises UserError."""
        where = folder(path)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model = load_part(AutoModelForImageTextToText, where, dtype=dtype)
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.processor = load_part(AutoProcessor, where)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # the last token of every row is the one before the answer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not getattr(self.processor, "chat_template", None):
            raise UserError(f"--judge {path} has no chat template: give a vision-language model made for chat")
        self.yes, self.no = self.first_tokens(YES), self.first_tokens(NO)
        both = self.yes & self.no  # a space of its own
        self.yes, self.no = sorted(self.yes - both), sorted(self.no - both)
        if not self.yes or not self.no:
            raise UserError(f"--judge {path}: its tokenizer does not tell yes from no by the first token")
        self.device = torch.device(device)
        self.batch = batch
        self.path = path

    def first_tokens(self, words):
        return {self.tokenizer.encode(word, add_special_tokens=False)[0] for word in words}

    @torch.no_grad()
    def __call__(self, image, questions):
        """A PIL image and n texts -> n probabilities: P(yes) / (P(yes) + P(no))."""
        found = []
        for first in range(0, len(questions), self.batch):
            texts = [self.prompt(question) for question in questions[first : first + self.batch]]
            try:
                inputs = self.processor(text=texts, images=[[image]] * len(texts), padding=True, return_tensors="pt")
            except ValueError as e:
                raise UserError(f"--judge {self.path} cannot read a picture and a question: {first_line(e)}") from None
            logits = self.model(**inputs.to(self.device, self.model.dtype), logits_to_keep=1).logits[:, -1].float()
            yes, no = (logits[:, tokens].logsumexp(-1) for tokens in (self.yes, self.no))
            found += (yes - no).sigmoid().tolist()
        return found

    def prompt(self, question):
        """The chat with a picture and a question, up to where the answer begins."""
        content = [{"type": "image"}, {"type": "text", "text": ASK.format(question)}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def look(self, item, path):
        """A picture file of an item (engine/dpg.py) -> {question id: probability of "yes"}."""
        with Image.open(path) as file:
            image = file.convert("RGB")
        questions = item["questions"]
        return dict(zip([q["id"] for q in questions], self(image, [q["text"] for q in questions])))
