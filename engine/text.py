"""Captions and prompts as people save them: UTF-8 with or without a BOM, UTF-16 with one. Nothing here loads torch.

A line ends at \\n or \\r\\n and nowhere else. What is not text (other bytes, NUL) is named with its line and left out;
above 5 % of the lines it ends the run.
"""

import codecs
import os
import re
from functools import lru_cache
from pathlib import Path

from engine.errors import UserError

MOST_BAD = 0.05  # the largest fraction of captions or pictures that may be unreadable
CAPTION = ("text", "caption", "prompt")  # columns and JSON keys of a caption; the first that is filled counts


def decode(content):
    """Bytes -> text. Bytes that are not text become lone surrogates, which `is_text` finds."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace").replace("\ufffd", "\udcff")
    return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def is_text(text):
    """Whether a decoded string is text: without NUL, undecoded bytes and lone surrogates (JSON can escape those)."""
    return not re.search(r"[\0\ud800-\udfff]", text)


def lines(path):
    """The lines of a text file that are not blank -> [(number from 1, stripped line)].

    Lines that are not text are left out. Raises UserError for a file that cannot be read, and above 5 % of such lines.
    """
    found = []
    for number, line in enumerate(decode(read(path)).split("\n"), 1):
        line = line.removeprefix("\ufeff").strip()  # files with a BOM, put together, have some inside
        if line:
            found.append((number, line))
    report_bad(path, [f"line {number}" for number, line in found if not is_text(line)], len(found))
    return [(number, line) for number, line in found if is_text(line)]


def prompts(path, flag="--prompts"):
    """The prompts in a file, one per line. Raises UserError for a file that is missing, empty or not text."""
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file (a text file, one prompt per line)")
    found = [line for _, line in lines(path)]
    if not found:
        raise UserError(f"{flag} {path} holds no prompt (one per line)")
    return found


def read(path):
    """A file's bytes. Raises UserError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def report_bad(where, bad, total):
    """Names what is not text, and how many there are; above 5 % of `total` it raises UserError instead."""
    if not bad:
        return
    named = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
    why = f"{where}: {len(bad)} of {total} captions or lines are not UTF-8 (nor UTF-16 with a BOM)"
    if len(bad) > MOST_BAD * total:
        raise UserError(f"{why}, more than 5 %: {named}; save the text as UTF-8")
    tell_once(f"{why} and are left out: {named}")


def caption(row, where):
    """The caption of a dict -> a string, or a list of strings where there are several; "" where there is none.

    Raises UserError for anything but a text or a list of texts.
    """
    value = next((row[key] for key in CAPTION if row.get(key) not in (None, "", [])), "")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: the caption must be a text or a list of texts, not {repr(value)[:80]}")
    texts = [text.strip() for text in texts if text.strip()]
    return texts if len(texts) > 1 else "".join(texts)


def all_text(caption):
    """`is_text` of a caption: of the string, or of every string in the list."""
    return is_text(caption if isinstance(caption, str) else "".join(caption))


def tell(line):
    """Print a line, on the first rank alone. Names of files may hold bytes that are not UTF-8."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line.encode("utf-8", "backslashreplace").decode("utf-8"))


@lru_cache
def tell_once(line):
    """`tell`, but not again: what a run checks before it loads anything is read once more when it begins."""
    tell(line)
