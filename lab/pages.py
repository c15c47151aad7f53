"""The pages results/*.md: Markdown tables of rows, and the figures that stand in the prose about them."""

import re
import textwrap
from statistics import mean

from lab import rows
from lab.verdicts import standard_error

HEADINGS = {
    "samples": "samples",
    "variation": "RMS difference",
    "prompt_accuracy": "prompts right, %",
    "frechet": "Fréchet",
    "precision": "precision, %",
    "recall": "recall, %",
    "clip_score": "CLIP",
    "reward": "reward",
    "saturation": "saturation",
    "contrast": "contrast",
    "rl_open": "RL open, %",
    "d_accuracy_unseen": "D right, unseen, %",
    "d_accuracy_x0": "of x_0, %",
    "x0_open": "open by x_0, %",
}
PERCENT = ("prompt_accuracy", "precision", "recall", "rl_open", "d_accuracy_unseen", "d_accuracy_x0", "x0_open")
DIGITS = {"frechet": 2, "reward": 2}  # in prose; percentages have 1, other measures 3
MISSING = "(Rows that this paragraph speaks of are missing.)"


def head(title, columns):
    """The first two lines of a Markdown table."""
    names = [HEADINGS.get(column, column) for column in columns]
    return [f"| {title} | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(columns)]


def line(title, found, columns):
    """A line of it: the mean over seeds, and each seed's value behind it where there are several."""
    cells = []
    for column in columns:
        values = [r[column] for r in found if r.get(column) is not None]
        scale, digits = (100, 1) if column in PERCENT else (1, 0 if column == "samples" else 3)
        if column == "samples":
            values = values[:1]  # the same with every seed
        shown = [f"{v * scale:.{digits}f}" for v in [mean(values), *values]] if values else [""]
        cells.append(shown[0] + (f" ({', '.join(shown[1:])})" if len(values) > 1 else ""))
    return f"| {title} | " + " | ".join(cells) + " |"


def average(found, measure):
    """The mean of a measure over rows."""
    return mean(r[measure] for r in found)


def figure(found, measure):
    """The same as prose has it: "94.3" of prompts right (in percent), "3.06" of the Fréchet distance."""
    if measure in PERCENT:
        return f"{100 * average(found, measure):.1f}"
    return f"{average(found, measure):.{DIGITS.get(measure, 3)}f}"


def right(found):
    return figure(found, "prompt_accuracy")


def frechet(found):
    return figure(found, "frechet")


def ratio(found, others, measure):
    """How many times the others' mean."""
    return average(found, measure) / average(others, measure)


def errors(found, others, measure):
    """How many standard errors of three seeds two means are apart, and whether that is noise."""
    sides = [[r[measure] for r in side] for side in (found, others)]
    apart = abs(mean(sides[0]) - mean(sides[1])) / standard_error(*sides)
    return f"{apart:.1f} standard errors" + ("" if apart > 2 else ", within noise")


def each(found, measure):
    """Every seed's value, as `figure` has it."""
    return ", ".join(figure([r], measure) for r in found)


def told(text, *found):
    """Prose with the figures of rows: `text` is a function of them. One line says so where some are missing.

    Its words ("seen", "not seen") are written for the rows in results/. Read it again where rows change.
    """
    try:
        return wrapped(text(*found))
    except (KeyError, ValueError):  # no row, fewer seeds of it than of another
        return MISSING


def wrapped(text):
    """Paragraphs and list items in lines of at most 120 columns."""
    lines = []
    for block in text.strip().split("\n\n"):
        for item in re.split(r"\n(?=- )", block):
            indent = "  " if item.startswith("- ") else ""
            words = " ".join(item.split())
            lines += textwrap.wrap(words, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines.append("")
    return "\n".join(lines).strip()


def write(path, num, page):
    """A page, written where it belongs and printed."""
    rows.place(path, num).write_text(page)
    print(page)


def joined(parts):
    """A page: its parts, text or the lines of a table, with an empty line between."""
    blocks = ["\n".join(part) if isinstance(part, list) else part.strip() for part in parts]
    return "\n\n".join(blocks) + "\n"
