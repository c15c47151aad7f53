"""What --prompts asks for: plain prompts, GenEval's or DPG-Bench's, and the names of its pictures. No torch here."""

import json
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engine import dpg, geneval, text
from engine.coco import COLUMNS
from engine.errors import UserError
from engine.folders import folder, read_json

NEED_PROMPTS = ("benchmark", "per_prompt", "images", "judge", "pick", "scores", "features", "real")
PER_PROMPT = {"geneval": geneval.PER_PROMPT, "dpg": dpg.PER_PROMPT}


@dataclass
class PromptSet:
    """Prompts, and how many pictures each gets. Picture i is the (i % per_prompt)-th of prompt i // per_prompt."""

    kind: str  # "geneval", "dpg", or "" for plain prompts
    items: list  # a dict per prompt: {"id", "prompt", and what its benchmark adds}
    per_prompt: int = 1

    @property
    def prompts(self):
        """The prompt of every picture."""
        return [item["prompt"] for item in self.items for _ in range(self.per_prompt)]

    def name(self, i):
        """The name of picture i in its folder: the benchmark's own, where it has one."""
        item, k = self.items[i // self.per_prompt]["id"], i % self.per_prompt
        if self.kind == "geneval":
            return f"{item}/samples/{k:04d}.png"
        return f"{item}/{k:04d}.png" if self.kind or self.per_prompt > 1 else f"{item}.png"

    def names(self):
        """[[name per picture] per prompt]"""
        n = self.per_prompt
        return [[self.name(i * n + k) for k in range(n)] for i in range(len(self.items))]

    def settings(self):
        """What settings.json of the pictures says of them."""
        more = {"benchmark": self.kind} if self.kind else {}
        if self.kind or self.per_prompt > 1:
            more |= {"per_prompt": self.per_prompt, "files": [name for names in self.names() for name in names]}
        return more | {"prompts": self.prompts}

    def prepare(self, where):
        """Make the pictures' folders, with GenEval's metadata.jsonl in each."""
        for i, item in enumerate(self.items):
            path = Path(where, self.name(i * self.per_prompt))
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.kind == "geneval":
                entry = {key: value for key, value in item.items() if key != "id"}
                Path(where, item["id"], "metadata.jsonl").write_text(json.dumps(entry))


def read(args):
    """evaluate.py's flags -> PromptSet, None without --prompts; what else they name is looked for. Raises UserError."""
    if not args.prompts:
        needing = [name for name in NEED_PROMPTS if getattr(args, name)]
        if needing:
            raise UserError(f"--{needing[0].replace('_', '-')} needs --prompts")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("torchrun is for --prompts: the toy's held-out prompts need one process")
        return None
    if not args.images:
        raise UserError("--prompts needs --images, a folder for the pictures")
    check(args)
    path = args.prompts
    if args.benchmark == "geneval":
        items = [{"id": f"{i:05d}"} | entry for i, entry in enumerate(geneval.read(path))]
    elif args.benchmark == "dpg":
        items = dpg.read(path, questions=bool(args.judge or answer_files(args.scores)))
    else:
        items = [{"id": f"{i:05d}", "prompt": prompt} for i, prompt in enumerate(text.prompts(path))]
    return PromptSet(args.benchmark or "", items[: args.num], args.per_prompt or PER_PROMPT.get(args.benchmark, 1))


def check(args):
    """Raises UserError for flags that do not go together, and for missing folders and packages."""
    published = "dpg" if Path(args.prompts).is_dir() else "geneval" if args.prompts.endswith(".jsonl") else None
    if published and not args.benchmark:
        raise UserError(f"--prompts {args.prompts} is no text file: add --benchmark {published}")
    if args.judge and not args.benchmark:
        raise UserError("--judge needs --benchmark geneval or dpg")
    if args.real and not args.features:
        raise UserError("--real needs --features, the network that compares (facebook/dinov2-large)")
    if args.real and not Path(args.real).exists():
        raise UserError(f"--real {args.real}: no such folder or file")
    for path in filter(None, (args.judge, args.pick, args.clip, *args.features)):
        if not str(path).endswith((".pth", ".pt")):
            folder(path)
        elif not Path(path).is_file():
            raise UserError(f"no such file: {path}")
    if args.benchmark == "geneval" and args.judge:
        kind = kind_of(args.judge)
        if kind not in ("mask2former", None):
            raise UserError(f"--judge {args.judge} is a {kind}: GenEval's detector is a Mask2Former")
        if not find_spec("scipy"):
            raise UserError("GenEval's detector needs the package scipy: pip install scipy")
    for path in args.features:
        kind = kind_of(path)
        if kind and not kind.startswith("dino"):
            raise UserError(f"--features {path} is a {kind}: give a DINOv2, such as facebook/dinov2-large")


def kind_of(path):
    """The model type of a transformers folder; None of a hub name or a file. Raises UserError for another folder."""
    where = Path(path) if str(path).endswith((".pth", ".pt")) else Path(folder(path))
    return read_json(where, "config.json").get("model_type", "network of another kind") if where.is_dir() else None


def answer_files(paths):
    """Those of --scores that hold DPG-Bench's answers. Other files, unreadable ones too, are left to `imported`."""
    return [path for path in paths if not is_scores(path)]


def is_scores(path):
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return True
    return not isinstance(content, dict) or bool(content.keys() & set(COLUMNS))


def imported(paths, num):
    """{column: mean}, {column: a score per picture} from the JSON files of --scores.

    Raises UserError for an unreadable one, or for other pictures.
    """
    means, each = {}, {}
    for path in paths:
        try:
            read_scores = json.loads(Path(path).read_text())
            scores = {k: list(map(float, v if isinstance(v, list) else [v])) for k, v in read_scores.items()}
            means |= {k: sum(v) / len(v) for k, v in scores.items()}
        except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as e:
            expected = '{"HPSv2": one score per picture, or their mean}'
            raise UserError(f"--scores {path}: {e} (expected {expected})") from None
        for name, values in scores.items():
            if name not in COLUMNS:
                raise UserError(f"--scores {path}: unknown column {name} (one of {', '.join(COLUMNS)})")
            if len(values) not in (1, num):
                raise UserError(f"--scores {path}: {len(values)} scores of {name} for {num} pictures")
            if len(values) == num:
                each[name] = values
    return means, each


def name_of(path):
    """A model's name in results: a hub name, or the last two parts of a folder."""
    return "/".join(Path(path).parts[-2:])


def slug(path):
    """A path or hub name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", str(path)).strip("-")
