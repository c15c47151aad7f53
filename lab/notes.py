"""The list of docs/paper.md: every ASSUMPTION and NOTE of the code, each linked to its line.

python -m lab.notes    writes what follows the mark in docs/paper.md
"""

import re
from pathlib import Path

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


if __name__ == "__main__":
    PAGE.write_text(page())
