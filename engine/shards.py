"""WebDataset shards: .tar files whose members are pictures and captions. Nothing here loads torch."""

import glob
import io
import json
import os
import re
import tarfile
from collections import defaultdict

from fsspec.core import OpenFile, has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from engine import text
from engine.errors import UserError

PICTURES = ("jpg", "jpeg", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")
CAPTIONS = ("txt", "json")


class Group:
    """Files grouped to samples by their key: a picture, and its captions. What is not used is counted and named.

    cut: str.partition where the key ends at the first dot of a name (WebDataset), str.rpartition at the last.
    """

    def __init__(self, cut):
        self.cut = cut
        self.pictures = {}  # key -> name
        self.captions = defaultdict(list)  # key -> names of files with captions
        self.texts = {}  # key -> a caption or several
        self.left_out = defaultdict(list)  # why -> names

    def add(self, name):
        """Takes in a file's name -> "picture", "caption", or None where it is left out; and the sample's key."""
        folder, slash, base = name.rpartition("/")
        stem, _, kind = self.cut(base, ".")
        key = folder + slash + stem
        kind = kind.lower()
        if base.startswith("."):
            self.left_out["hidden files"].append(name)
        elif kind in PICTURES and key in self.pictures:
            self.left_out["more pictures of a name that has one"].append(name)
        elif kind in PICTURES:
            self.pictures[key] = name
            return "picture", key
        elif kind in CAPTIONS:
            self.captions[key].append(name)
            return "caption", key
        elif kind.rpartition(".")[2] in PICTURES + CAPTIONS and "." in kind:
            self.left_out["files with a dot in their name (a sample's name ends at the first dot)"].append(name)
        else:
            self.left_out[f"files of a kind that is not read (.{kind})"].append(name)
        return None, key

    def read(self, key, content, name, bad):
        """Takes in a caption file's content: the whole text, or a JSON object's "text", "caption" or "prompt".

        The first one of a sample counts. Adds to `bad` what is not text. Raises UserError for captions of other types.
        """
        said = text.decode(content).strip()
        if name.lower().endswith(".json") and text.is_text(said):
            try:
                row = json.loads(said)
            except (ValueError, RecursionError):
                self.left_out["broken .json files"].append(name)
                return
            said = text.caption(row, name) if isinstance(row, dict) else ""
        if not text.all_text(said):
            bad.append(name + (f", line {line_of(said)}" if isinstance(said, str) else ""))
        elif said:
            self.texts.setdefault(key, said)

    def rows(self):
        """[(name, caption or several)] of the pictures that have captions."""
        return [(name, self.texts[key]) for key, name in self.pictures.items() if key in self.texts]

    def report(self, where):
        """Names and counts what is left out."""
        no_caption = 'images without a caption (.txt, or .json with "text" or "caption")'
        bare = [name for key, name in self.pictures.items() if key not in self.texts]
        alone = [name for key, names in self.captions.items() if key not in self.pictures for name in names]
        for why, names in (*self.left_out.items(), (no_caption, bare), ("captions without an image", alone)):
            if names:
                text.tell(f"left out of {where}: {len(names)} {why}, the first: {names[0]}")


def line_of(said):
    """The number of the first line that is not text."""
    return next((n for n, line in enumerate(said.split("\n"), 1) if not text.is_text(line)), 1)


def find(pattern):
    """The shards that a pattern names: braces, globs and every URL of fsspec -> [OpenFile].

    What exists is taken as it is written: a[1].tar is a file, not a glob. Raises UserError where there is none.
    """
    if pattern.startswith("pipe:"):
        raise UserError(f"--data {pattern}: give a URL that fsspec opens (http, s3, gs, ...) in place of a command")
    found = []
    try:
        for name in [pattern] if os.path.exists(pattern) else braces(pattern):
            fs, path = url_to_fs(name)
            local = isinstance(fs, LocalFileSystem)
            if not has_magic(path) or fs.exists(path):
                if local and not os.path.isfile(path):
                    raise UserError(f"--data {pattern}: no such file: {path}")
                found.append(OpenFile(fs, path))
            else:
                found += [OpenFile(fs, match) for match in sorted(fs.glob(escaped(path) if local else path))]
    except (OSError, ValueError, ImportError) as e:
        raise UserError(f"cannot find the shards {pattern}: {e}") from None
    if not found:
        raise UserError(f"--data {pattern} matches no file")
    other = next((shard.path for shard in found if not shard.path.endswith(".tar")), None)
    if other and "://" not in pattern:
        raise UserError(f"--data {pattern}: {other} is no .tar file (a compressed one must be unpacked to a .tar)")
    return found


def literal(path):
    """A local file as one of fsspec's."""
    return OpenFile(LocalFileSystem(), str(path))


def escaped(path):
    """A local pattern whose leading folders that exist are taken as they are written."""
    done = ""
    parts = path.split("/")
    for place, part in enumerate(parts[:-1]):
        if not os.path.isdir("/".join(parts[: place + 1]) or "/"):
            return done + "/".join(parts[place:])
        done += glob.escape(part) + "/"
    return done + parts[-1]


def braces(pattern):
    """Brace patterns, as in shells and WebDataset: "a{00..11}b", "a{x,y}b" -> the names, in order."""
    m = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*))\}", pattern)
    if not m:
        return [pattern]
    low, high, words = m.groups()
    if low is None:
        options = words.split(",")
    else:
        options = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return [name for option in options for name in braces(pattern[: m.start()] + option + pattern[m.end() :])]


def index(shards, where):
    """Reads shards through, once -> [(name, caption or several)], and {name: (shard, first byte, length)} of pictures.

    Names and counts what is left out. Raises UserError where nothing is left.
    """
    samples = Group(str.partition)
    places = {}
    bad = []
    for shard in tqdm(shards, desc="shards", disable=len(shards) < 20):
        places |= members(shard, samples, bad)
    text.report_bad(where, bad, len(samples.captions))
    samples.report(where)
    rows = samples.rows()
    if not rows:
        raise UserError(f"{where} holds no image with a caption (.txt or .json of the same name); pictures: {PICTURES}")
    return rows, places


def members(shard, samples, bad):
    """Adds a shard's members to `samples` -> {name: (shard, first byte, length)}. bad: captions that are not text.

    A torn shard is reported, and read up to where it is torn. Raises UserError where no image of it can be read.
    """
    places = {}
    try:
        with shard as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = f"{shard.full_name}/{member.name}"
                if not member.isfile():
                    samples.left_out["links and special files"] += [name] * (not member.isdir())
                    continue
                kind, key = samples.add(name)
                if kind == "caption":
                    samples.read(key, tar.extractfile(member).read(), name, bad)
                elif kind == "picture":
                    places[name] = (shard, member.offset_data, member.size)
            check_end(file, tar.offset)
    except (tarfile.TarError, OSError) as e:
        if not places:
            raise UserError(f"cannot read the shard {shard.full_name}: {e}") from None
        last = list(places)[-1].removeprefix(f"{shard.full_name}/")
        text.tell(f"shard {shard.full_name} is torn ({e}): what follows {last} is left out")
    return places


def check_end(file, offset):
    """Raises tarfile.ReadError where tarfile took a broken header for the end, which is at least two zero blocks."""
    if file.seek(0, io.SEEK_END) < offset + 1024:
        raise tarfile.ReadError("it has no end")
    file.seek(offset)
    if any(any(part) for part in iter(lambda: file.read(1 << 20), b"")):
        raise tarfile.ReadError(f"no header at byte {offset}")
