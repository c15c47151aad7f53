"""The line numbers in docs/: the list of docs/paper.md, and links to functions.

    python -m lab.notes    writes what follows the mark in docs/paper.md, and renews [`file.py`: `function`](...#L1)

The list is every ASSUMPTION and NOTE of the code, each linked to its line.
"""

import ast
import re
from pathlib import Path

from engine.errors import UserError
from engine.flags import fail

PAGE = Path("docs/paper.md")
MARK = "<!-- python -m lab.notes writes what follows -->"
FILES = ("*.py", "siblings/*.py", "engine/*.py")
FOUND = re.compile(r"\b(ASSUMPTION|NOTE): ")
ENDS = re.compile(
    r'^\s*(#\s*)?$|"""|^\s*Left out|^\s*(#\s*)?(ASSUMPTION|NOTE): '
)  # lines that no longer belong to a mark


def marks(path):
    """Every mark of a file -> (line, "ASSUMPTION" or "NOTE", its text in one line)."""
    lines = path.read_text().splitlines()
    found = []
    for number, line in enumerate(lines):
        match = FOUND.search(line)
        if match:
            text = [line[match.end() :]]
            for following in lines[number + 1 :] if goes_on(line) else ():
                if ENDS.search(following) or not alike(line, following):
                    break
                text.append(following.strip().removeprefix("#"))
            found.append((number + 1, match[1], sentence(" ".join(t.strip() for t in text), line[: match.start()])))
    return found


def goes_on(line):
    """Whether a mark may have further lines: not where it stands behind code."""
    return line.lstrip().startswith("#") or "#" not in line


def alike(line, following):
    """Whether both lines are comments of one indentation, or text of one indentation."""
    indent = len(line) - len(line.lstrip())
    same = len(following) - len(following.lstrip()) == indent
    return same and line.lstrip().startswith("#") == following.lstrip().startswith("#")


def sentence(text, before):
    """A mark's text, which ends with its bracket where it stands in one."""
    if before.endswith("("):
        text = text[: text.index(")")]
    return text.rstrip(".").replace("*", r"\*").replace("<", r"\<") + "."


def page():
    """docs/paper.md with its list renewed."""
    lines = [PAGE.read_text().split(MARK)[0] + MARK, ""]
    for path in sorted(path for pattern in FILES for path in Path().glob(pattern)):
        found = marks(path)
        if found:
            lines += [f"**{path}**", ""]
            lines += [f"- [line {n}](../{path}#L{n}), {kind.lower()}: {text}" for n, kind, text in found]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


LINK = re.compile(r"\[`([\w/]+\.py)`:\s`([\w.]+)`\]\(\.\./[\w/.]+#L\d+\)")


def definition(path, name):
    """The syntax tree of a function, a class, or a method, "Class.method". Raises UserError where there is none."""
    node = ast.parse(Path(path).read_text())
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", "") == part), None)
        if node is None:
            raise UserError(f"docs/ link to {name} in {path}, which is not there: correct the link")
    return node


def linked(text):
    """A page of docs/ whose links [`file.py`: `function`](...) lead to the line where the function begins."""
    at = lambda m: f"[`{m[1]}`: `{m[2]}`](../{m[1]}#L{definition(m[1], m[2]).lineno})"  # noqa: E731
    return LINK.sub(at, text)


def main():
    try:
        renewed = {path: linked(path.read_text()) for path in Path("docs").glob("*.md")} | {PAGE: page()}
    except UserError as e:
        fail(e)
    for path, text in renewed.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
