"""docs/index.html: docs/walkthrough.md beside the code that it links to. Self-contained, without JavaScript.

    make page      python -m lab.notes, which renews the links' lines, then python -m lab.page, which writes the page

A symbol has one colour in formulas and code: lab/symbols.py. Needs the packages of `pip install -e ".[page]"`; they
are in requirements.txt too.
"""

import base64
import html
import re
import textwrap
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from engine.errors import UserError
from engine.flags import fail
from lab.notes import LINK, definition
from lab.symbols import COLOUR, SYMBOLS

SOURCE, PAGE, STYLE = Path("docs/walkthrough.md"), Path("docs/index.html"), Path("lab/page.css")

TAG = re.compile(r"\s*\\tag\{(.*?)\}")  # the number of an equation, which the converter does not know
WORD = re.compile(r"(?<!\d-)[^\W\d][^\W²]*[\u0300-\u036f]*")  # with its hat; not the square of σ_t², nor 2-D


# ------------------------------------------------------------------------------------------------- formulas


def tree(latex, display):
    """LaTeX -> a MathML element, without namespaces. Raises UserError for LaTeX that the converter does not know."""
    from latex2mathml.converter import convert

    text = convert(latex, display="block" if display else "inline")
    try:
        return ET.fromstring(text.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', ""))
    except ET.ParseError:  # it lets the & of an unknown environment through
        raise UserError(f"latex2mathml cannot read this formula: {latex.strip()}") from None


def same(a, b):
    """Whether two elements are one formula: tags, text and children."""
    alike = a.tag == b.tag and (a.text or "").strip() == (b.text or "").strip() and len(a) == len(b)
    return alike and all(map(same, a, b))


def symbol_trees():
    """[(colour, LaTeX, its element)], the longest first."""
    found = {latex: (colour, latex, tree(latex, False)[0][0]) for colour, latex, _ in SYMBOLS if latex}
    return sorted(found.values(), key=lambda entry: -len(entry[1]))


def paint(element, symbols, seen):
    """In place: every symbol of a formula gets its colour's class. seen: a set that takes the LaTeX of those found."""
    for colour, latex, symbol in symbols:
        if same(element, symbol):
            element.set("class", colour)
            seen.add(latex)
            return
    for child in element:
        paint(child, symbols, seen)


def mathml(latex, display, symbols, seen):
    """LaTeX -> MathML as text, its symbols coloured."""
    root = tree(latex, display)
    paint(root, symbols, seen)
    return ET.tostring(root, encoding="unicode")


# ----------------------------------------------------------------------------------------------------- code


def short(kind):
    """Pygments' short name of a token's kind, such as "k" for a keyword."""
    from pygments.token import STANDARD_TYPES

    while kind not in STANDARD_TYPES:
        kind = kind.parent
    return STANDARD_TYPES[kind]


def names_of(in_formulas):
    """The names in code of a station's symbols: one letter where it is a symbol itself, longer ones by their colour."""
    colours = {colour for colour, latex, _ in SYMBOLS if latex in in_formulas}
    return {n for colour, latex, n in SYMBOLS if latex in in_formulas or colour in colours and len(n) > 1}


def coloured(kind, text, names, seen):
    """A token as HTML, those of `names` in their colours. seen: a set that takes the names found."""
    from pygments.token import Comment, Name, String

    def one(match):
        name = match[0]
        if name not in names:
            return html.escape(name)
        seen.add(name)
        return f'<b class="{COLOUR[name]}">{name}</b>'

    parts = []
    if kind in Name or kind in Comment or kind in String.Doc:
        at = 0
        for match in WORD.finditer(text):
            parts += [html.escape(text[at : match.start()]), one(match)]
            at = match.end()
        text = text[at:]
    return "".join(parts) + html.escape(text)


def code(path, name, names, seen):
    """A function's source as HTML, a line an element with its number. names, seen: those of `coloured`."""
    from pygments.lexers import PythonLexer

    node = definition(path, name)
    lines = Path(path).read_text().splitlines()
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
    out = [""]
    for kind, text in PythonLexer().get_tokens(source):
        css = short(kind)
        for i, piece in enumerate(text.split("\n")):
            if i:
                out.append("")
            if piece:
                inner = coloured(kind, piece, names, seen)
                out[-1] += f'<span class="{css}">{inner}</span>' if css else inner
    rows = []
    for i, (line, plain) in enumerate(zip(out[:-1], source.split("\n"), strict=True)):
        indent = len(plain) - len(plain.lstrip())
        rows.append(f'<span class="line" data-n="{first + i}" style="--indent: {indent + 4}ch">{line}</span>')
    where = f'<a href="../{path}">{path}</a>: <b>{name}</b>'
    head = f"<figcaption><span>{where}</span> <span>lines {first} to {node.end_lineno}</span></figcaption>"
    return f'<figure class="code">{head}<pre><code>' + "".join(rows) + "</code></pre></figure>"


# ------------------------------------------------------------------------------------------------- stations


@dataclass
class Station:
    """A part of walkthrough.md below one heading."""

    title: str
    words: str  # idea, formulas, what is left open, what to try, in Markdown
    picture: str = ""  # its path, from docs/
    alt: str = ""
    caption: str = ""
    functions: list = field(default_factory=list)  # (path, name)


def stations(text):
    """walkthrough.md -> its introduction in Markdown, and its stations. Raises UserError for one that is not whole."""
    intro, *parts = re.split(r"^## ", text, flags=re.M)
    found = []
    for part in parts:
        title, body = part.split("\n", 1)
        functions = [(m[1], m[2]) for m in LINK.finditer(body)]
        body = re.sub(r"^\*\*Code:\*\*.*?\n\n", "", body, flags=re.M | re.S)
        match = re.fullmatch(r"(.*)!\[([^\]]*)\]\(([^)]*)\)\n\n(.*?)(\*\*Try it:.*)", body, flags=re.S)
        if not match or not functions:
            raise UserError(f"{SOURCE}, {title}: needs links to its code, a picture with words below, and **Try it:**")
        before, alt, picture, caption, after = match.groups()
        if not Path("docs", picture).is_file():
            raise UserError(f"no docs/{picture}: python -m lab.figures --only {Path(picture).stem} draws it")
        found.append(Station(title, before + after, picture, alt, caption, functions))
    return intro, found


def prose(text, symbols, seen):
    """Markdown with GitHub's math -> HTML."""
    from markdown import markdown

    formulas = []

    def keep(latex, display):
        number = TAG.search(latex)
        made = mathml(TAG.sub("", latex), display, symbols, seen)
        formulas.append(made + (f'<span class="number">({number[1]})</span>' if number else ""))
        return f"FORMULA{len(formulas) - 1}E"

    text = re.sub(r"```math\n(.*?)```", lambda m: keep(m[1], True), text, flags=re.S)
    text = re.sub(r"\$`(.*?)`\$", lambda m: keep(m[1], False), text)
    made = markdown(text)
    made = re.sub(r"<p>(FORMULA\d+E)</p>", r'<div class="formula">\1</div>', made)
    return re.sub(r"FORMULA(\d+)E", lambda m: formulas[int(m[1])], made)


def legend(in_formulas, in_code, symbols):
    """The symbols that stand in a station's formulas and in its code, each beside its names."""
    named = {}
    for _, latex, name in SYMBOLS:
        if latex in in_formulas and name in in_code and name.isascii():
            named.setdefault(latex, []).append(name)
    items = []
    for latex, names in named.items():
        words = ", ".join(f'<code class="{COLOUR[n]}">{n}</code>' for n in names)
        items.append(f"<li>{mathml(latex.removesuffix('^2'), False, symbols, set())} = {words}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def section(station, number, symbols):
    """A station as HTML."""
    in_formulas, in_code = set(), set()
    words = prose(station.words, symbols, in_formulas)
    names = names_of(in_formulas)
    listings = "".join(code(path, name, names, in_code) for path, name in station.functions)
    left_open = "<p><strong>Left open"
    words = words.replace(left_open, legend(in_formulas, in_code, symbols) + left_open, 1)
    data = base64.b64encode(Path("docs", station.picture).read_bytes()).decode()
    caption = prose(station.caption, symbols, set())
    picture = f'<img src="data:image/png;base64,{data}" alt="{html.escape(station.alt)}">'
    return (
        f'<section id="s{number}"><h2>{html.escape(station.title)}</h2>\n<div class="pair"><div class="words">{words}'
        f'</div>\n<div class="listing">{listings}</div></div>\n'
        f'<figure class="picture"><div>{picture}</div><figcaption>{caption}</figcaption></figure></section>\n'
    )


def page():
    """docs/index.html from walkthrough.md, its pictures, and the sources. Raises UserError for what is missing."""
    for package in ("latex2mathml", "markdown", "pygments"):
        if find_spec(package) is None:
            raise UserError(f'no package {package}: pip install -e ".[page]", or the pins of requirements.txt')
    symbols = symbol_trees()
    intro, found = stations(SOURCE.read_text())
    title, intro = intro.removeprefix("# ").split("\n", 1)
    intro = "\n\n".join(p for p in intro.split("\n\n") if "(index.html)" not in p)  # a link to itself
    contents = "".join(f'<li><a href="#s{n}">{s.title.split(". ", 1)[1]}</a></li>' for n, s in enumerate(found, 1))
    body = "".join(section(s, n, symbols) for n, s in enumerate(found, 1))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1>{prose(intro, symbols, set())}</header>\n<nav><ol>{contents}</ol></nav>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def main():
    try:
        PAGE.write_text(page())
    except UserError as e:
        fail(e)
    print(f"{PAGE}, {PAGE.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
