"""What --data and --pairs name: folders of pictures in the layouts people have, and the captions in them.

    metadata.jsonl, .csv or .parquet    columns "file_name" and "text" (Hugging Face's ImageFolder), also in subfolders
    name.txt or name.json               beside name.jpg, in any subfolder
    *.tar                               WebDataset shards, of engine/shards.py
    train/                              any of these in it, where the folder itself holds none

Nothing here loads torch: what cannot be understood is answered at once, with what was found and what would work.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from engine import shards, text
from engine.errors import UserError
from engine.shards import PICTURES, Group

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
WORKS = (
    'what works: a metadata.jsonl, .csv or .parquet with "file_name" and "text", a name.txt beside each name.jpg, '
    "or .tar shards (docs/data.md)"
)
PAIR_COLUMNS = ("caption", "jpg_0_file_name", "jpg_1_file_name", "label_0")


@dataclass
class Layout:
    """A folder with one kind of captions, or shards: only one of the three fields below is filled."""

    root: Path
    tables: list = field(default_factory=list)  # paths of metadata files
    shards: list = field(default_factory=list)  # of fsspec's OpenFile
    pictures: Group = None  # pictures with captions beside them


def find(name):
    """What --data `name` names -> a Layout. Raises UserError with what was found where it is nothing of the kind."""
    path = Path(name)
    if path.is_dir():
        return in_folder(path)
    if path.suffix == ".tar" or any(sign in str(name) for sign in ("*", "{", "://", "pipe:")):
        return Layout(path, shards=shards.find(str(name)))
    if path.is_file():
        folder = f"give its folder, {path.parent}" if path.name in TABLES else WORKS
        raise UserError(f"--data {name} is a file: {folder}")
    raise UserError(f"--data {name}: no such folder ({WORKS}); a data set of a hub must be downloaded first")


def in_folder(folder):
    """The Layout of a folder: the first of its own table, that of train/, and what lies in its subfolders."""
    for root in (folder, folder / "train"):
        tables = [root / name for name in TABLES if (root / name).is_file()]
        if tables:
            if tables[1:]:
                text.tell_once(f"{tables[0]} is read, {tables[1].name} beside it is left out")
            return Layout(root, tables=tables[:1])
    own = {ending(name) for name in os.listdir(folder) if (folder / name).is_file()}
    root = folder if own & {"tar", *PICTURES} or not (folder / "train").is_dir() else folder / "train"
    names = walk(str(root), root.stat().st_mtime_ns)
    tables = [root / name for name in names if name.rpartition("/")[2] in TABLES]
    if tables:
        return Layout(root, tables=tables)
    tars = [name for name in names if ending(name) == "tar" and not name.rpartition("/")[2].startswith(".")]
    if tars:
        others = sorted(set(names) - set(tars))
        if others:
            text.tell_once(f"left out of {root}: {len(others)} files beside the shards, the first: {others[0]}")
        return Layout(root, shards=[shards.literal(root / name) for name in tars])
    pictures = Group(str.rpartition)
    for name in names:
        pictures.add(name)
    if pictures.captions.keys() & pictures.pictures.keys():
        return Layout(root, pictures=pictures)
    found = Counter(f".{ending(name)}" if ending(name) else "without an ending" for name in names)
    held = ", ".join(f"{n} {kind}" for kind, n in found.most_common(6)) or "nothing"
    lacks = "pictures without captions: " if pictures.pictures else ""
    raise UserError(f"{folder} has no metadata.jsonl and nothing else with captions. It holds {lacks}{held}; {WORKS}")


@lru_cache(maxsize=4)
def walk(root, stamp):
    """The files under a folder, sorted, as paths from it. stamp: the folder's time of change, for the cache."""
    found = []
    seen = set()  # folders, so that a circle of links ends

    def refuse(e):
        raise UserError(f"cannot read {e.filename}: {e.strerror}")

    for folder, inner, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/") for name in names]
    return sorted(found)


def ending(name):
    """The part of a file name behind its last dot, in small letters."""
    return os.path.splitext(name)[1][1:].lower()


def check(name):
    """Raises UserError where --data cannot be used, as far as that shows without reading shards, or over a network."""
    if re.match(r"\S+://", str(name)):
        return
    layout = find(name)
    if layout.tables:
        captions(layout)


def captions(layout):
    """The pictures and captions of a folder: [(name from its root, a caption or several)]. Raises UserError."""
    rows = []
    for table in layout.tables:
        stamp = table.stat()
        inside = table.parent.relative_to(layout.root)
        rows += [(str(inside / name), said) for name, said in of_table(table, stamp.st_mtime_ns, stamp.st_size)]
    if layout.pictures:
        rows = beside(layout)
    if not rows:
        where = layout.tables[0] if layout.tables else layout.root
        raise UserError(f"{where} names no image with a caption; {WORKS}")
    return rows


def beside(layout):
    """Captions in files beside the pictures."""
    bad = []
    for key, names in layout.pictures.captions.items():
        for name in names:
            layout.pictures.read(key, text.read(layout.root / name), name, bad)
    text.report_bad(layout.root, bad, len(layout.pictures.captions))
    layout.pictures.report(layout.root)
    return layout.pictures.rows()


@lru_cache(maxsize=4)
def of_table(table, stamp, size):
    """The (file name, caption) of every row of a metadata file. stamp, size: of the file, for the cache."""
    records = {".jsonl": of_jsonl, ".csv": of_csv, ".parquet": of_parquet}[table.suffix](table)
    rows = []
    bad = []
    for number, row in records:
        where = f"{table}, line {number}"
        name = row.get("file_name")
        if not name or not any(key in row for key in text.CAPTION):
            raise lacking(where, row)
        if not isinstance(name, str):
            raise UserError(f"{where}: file_name must be a text, not {repr(name)[:80]}")
        said = text.caption(row, where)
        if not said:
            raise UserError(f"{where}: the caption of {name} is empty")
        if text.is_text(name) and text.all_text(said):
            rows.append((name.strip(), said))
        else:
            bad.append(f"line {number}")
    text.report_bad(table, bad, len(records))
    return rows


def lacking(where, row):
    """The UserError for a row without a file name or a caption column."""
    found = ", ".join(f'"{key}"' for key in row) or "nothing"
    return UserError(f'{where}: needs "file_name" and "text" (a caption), has {found[:200]}')


def of_jsonl(table):
    """A file with a JSON object per line -> [(line number, dict)]."""
    return [(number, of_json(line, f"{table}, line {number}")) for number, line in text.lines(table)]


def of_json(line, where):
    """A JSON object -> dict. Raises UserError for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: no JSON object ({e}); needs one per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object; needs one object per line")
    return row


def of_csv(table):
    """A table with commas, its first row the names of columns -> [(line number, dict)]. Quotes may hold newlines."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text.decode(text.read(table)), newline="\n"), skipinitialspace=True)
    records = []
    try:
        for row in reader:
            if None in row:
                why = "more fields than the first line has names: put captions with commas in quotes"
                raise UserError(f"{table}, line {reader.line_num}: {why}")
            records.append((reader.line_num, row))
    except csv.Error as e:
        raise UserError(f"{table}, line {reader.line_num}: {e}") from None
    return records


def of_parquet(table):
    """[(row number from 1, dict)] of a Parquet file's columns with names and captions."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        why = "is read with pyarrow, which is not installed: pip install pyarrow, or save it as metadata.csv"
        raise UserError(f"{table} {why}") from None
    try:
        file = parquet.ParquetFile(table)
        names = file.schema_arrow.names
        rows = file.read([name for name in names if name in ("file_name", *text.CAPTION)]).to_pylist()
    except Exception as e:  # pyarrow has errors of its own
        raise UserError(f"cannot read {table}: {e}") from None
    if "file_name" not in names or not any(key in names for key in text.CAPTION):
        raise lacking(table, dict.fromkeys(names))
    return list(enumerate(rows, 1))


def pairs(path):
    """The rows of --pairs' metadata.jsonl -> [(line number, dict)]. Raises UserError for missing columns and labels."""
    table = Path(path, "metadata.jsonl")
    if not table.is_file():
        raise UserError(f"--pairs {path} has no metadata.jsonl (per line: {', '.join(PAIR_COLUMNS)})")
    rows = of_jsonl(table)
    for number, row in rows:
        where = f"{table}, line {number}"
        if not all(isinstance(row.get(key), str) for key in PAIR_COLUMNS[1:3]) or "label_0" not in row:
            has = ", ".join(f'"{key}"' for key in row) or "nothing"
            raise UserError(f"{where}: needs {', '.join(PAIR_COLUMNS)}, has {has[:200]}")
        if not text.caption(row, where):
            raise UserError(f"{where}: needs caption, a text that is not empty")
        if row["label_0"] not in (0, 0.5, 1):
            raise UserError(f"{where}: label_0 is {row['label_0']!r}, must be 1, 0 or 0.5 (a tie)")
    return rows
