"""Results of evaluate.py side by side: a table with the papers' rows, and a page of pictures. No torch here.

A result is a file of --json. Where it names its pictures ("images": DIR), DIR/scores.json holds what the page shows:
{"prompts": [text], "files": [[name per picture] per prompt], "columns": {name: [[score per picture] per prompt]},
"notes": [[text per picture] per prompt]}; the first column sorts the page.
"""

import base64
import html
import io
import json
from collections import Counter
from pathlib import Path

from PIL import Image

from engine import dpg, geneval
from engine.coco import COLUMNS, PAPER
from engine.errors import UserError

COLUMN = {  # the key of a result -> the heading of its column
    "prompt_accuracy": "prompts right",
    "frechet": "Fréchet",
    "clip_score": "CLIP score",
    "reward": "reward",
    "saturation": "saturation",
    "contrast": "contrast",
    **{name: name for name in COLUMNS},
    "geneval": "GenEval",
    **{task: task.replace("_", " ") for task in geneval.TASKS},
    "dpg": "DPG",
    "dpg_released": "DPG as released",
    **dict.fromkeys(dpg.BROAD),
    "judge": "judge",
    "diversity": "diversity",
    "fd_dino": "FD-DINO",
    "fid": "FID",
    "precision": "precision",
    "recall": "recall",
}
MOST = 50  # prompts on the page
SIDE = 256  # pixels of a picture on the page, at most


def read(path):
    """A file of --json -> its result, a dict with "name" and, where its pictures are there, "scores".

    Raises UserError.
    """
    path = Path(path)
    try:
        result = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"--compare {path}: {e} (a file that evaluate.py --json wrote)") from None
    result = {"name": path.stem} | result | {"path": path}
    if result.get("images"):
        given = Path(result["images"])
        there = next((d for d in (given, path.parent / given, path.parent / given.name) if d.is_dir()), None)
        if there and (there / "scores.json").is_file():
            result["folder"] = there
            try:
                result["scores"] = json.loads((there / "scores.json").read_text())
            except ValueError:
                raise UserError(f"{there / 'scores.json'} is torn: run the evaluation of {path} again") from None
    return result


PROMPTS = {"geneval": 553, "dpg": 1065}


def title(result):
    """The name of a result's row; of a part of a benchmark with the number of its prompts."""
    part = result.get("num", 0) < PROMPTS.get(result.get("benchmark"), 0)
    return f"{result['name']} ({result['num']} prompts)" if part else result["name"]


def row(result):
    """The cells of a result, {key of COLUMN: text}."""
    values = dict(result) | result.get("geneval_tasks", {}) | result.get("dpg_categories", {})
    cells = {key: cell(values[key]) for key in COLUMN if values.get(key) is not None}
    if "diversity" in cells and result.get("diversity_error"):
        cells["diversity"] += f" ± {result['diversity_error']:.4f}"
    return cells


def papers(keys, plain):
    """The papers' rows of what is compared: [(name, NFE, {key: text})]. plain: whether prompts of no benchmark are."""
    rows = []
    if plain and keys & set(COLUMNS):
        rows += [(name, nfe, dict(zip(COLUMNS, map(cell, values)))) for name, (nfe, *values, _) in PAPER.items()]
    if "geneval" in keys:
        for name, values in geneval.PAPER.items():
            rows.append((name, "", dict(zip(("geneval", *geneval.TASKS), map(cell, values)))))
    if "dpg" in keys:
        for name, values in dpg.PAPER.items():
            cells = dict(zip(("dpg_released", *dpg.BROAD), map(cell, values)))
            rows.append((name, "", cells | {"judge": "mPLUG-large"}))
    return rows


def table(results):
    """Rows of the papers and of the results: a list of lists of texts, the first its heading."""
    ours = [(f"**{title(result)}**", cell(result.get("nfe")), row(result)) for result in results]
    keys = {key for *_, cells in ours for key in cells}
    rows = papers(keys, not all(result.get("benchmark") for result in results)) + ours
    keys |= {key for *_, cells in rows for key in cells}
    shown = [key for key in COLUMN if key in keys]
    heading = ["", "NFE", *(COLUMN[key] or key for key in shown)]
    return [heading, *([name, str(nfe), *(cells.get(key, "") for key in shown)] for name, nfe, cells in rows)]


def markdown(rows):
    """A list of rows -> a Markdown table."""
    escaped = [[text.replace("|", "\\|") for text in cells] for cells in rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in escaped]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def cell(value):
    """A value of the table as text; None is empty."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def shared(results):
    """What the page shows, worst first: [(prompt, its place in each result)], sorted by the last result's first column.

    Of prompts that all results have. Pictures without a score come last.
    """
    places = []
    for result in results:
        times = Counter()
        seen = {}  # (prompt, how often it came before) -> its place
        for i, prompt in enumerate(result["scores"]["prompts"]):
            seen[prompt, times[prompt]] = i
            times[prompt] += 1
        places.append(seen)
    common = [key for key in places[-1] if all(key in seen for seen in places)]
    columns = list(results[-1]["scores"]["columns"].values())

    def score(key):
        values = columns[0][places[-1][key]] if columns else []
        values = [float(value) for value in values if value is not None]
        return sum(values) / len(values) if values else float("inf")

    return [(key[0], [seen[key] for seen in places]) for key in sorted(common, key=score)]


def picture(path):
    """A picture file as a data URI, SIDE pixels at most."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr.ours td { font-weight: 600; background: #f2f7ff }
section { border-top: 2px solid #ccc; padding: .8rem 0 }
h2 { font-size: 16px; margin: 0 0 .5rem; max-width: 60rem }
.models { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem }
.model > b { display: block; margin-bottom: .3rem }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem }
figure { margin: 0; width: 160px }
figure img { width: 160px; height: auto; display: block; border: 3px solid #ddd }
figure.right img { border-color: #3a9a4a } figure.wrong img { border-color: #cc4b37 }
figcaption { font-size: 12px; overflow-wrap: anywhere }
"""


def page(results, rows, most=MOST):
    """One self-contained HTML page: the table, and the pictures of at most `most` prompts, worst first."""
    drawn = [result for result in results if "scores" in result]
    pairs = shared(drawn) if drawn else []
    body = [f"<h1>{escape(' / '.join(result['name'] for result in results))}</h1>", html_table(rows)]
    if drawn:
        by = next(iter(drawn[-1]["scores"]["columns"]), "no score")
        body.append(f"<p>{min(most, len(pairs))} of {len(pairs)} prompts, worst first by {escape(by)} of ")
        body.append(f"{escape(drawn[-1]['name'])}. {escape(noise(drawn))}</p>")
    for prompt, places in pairs[:most]:
        body.append(f'<section><h2>{escape(prompt)}</h2><div class="models">')
        body += [pictures(result, place) for result, place in zip(drawn, places)]
        body.append("</div></section>")
    head = f'<meta charset="utf-8"><title>Evaluation</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def noise(results):
    """What the page says of the noise of pictures side by side."""
    if len(results) == 1:
        return ""
    alike = all(len({str(result.get(key)) for result in results}) == 1 for key in ("seed", "resolution"))
    return "Pictures in one place began from the same noise." if alike else "The results differ in seed or resolution."


def html_table(rows):
    lines = ["".join(f"<th>{escape(text)}</th>" for text in rows[0])]
    for cells in rows[1:]:
        mark = ' class="ours"' if cells[0].startswith("**") else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(text.strip('*'))}</td>" for text in cells) + "</tr>")
    return f"<table><tr>{lines[0]}</tr>{''.join(lines[1:])}</table>"


def pictures(result, place):
    """A result's pictures of a prompt, each with its scores."""
    scores = result["scores"]
    figures = []
    for k, name in enumerate(scores["files"][place]):
        values = {column: values[place][k] for column, values in scores["columns"].items()}
        mark = {True: ' class="right"', False: ' class="wrong"'}.get(values.get("right"), "")
        lines = [f"{column} {cell(value)}" for column, value in values.items() if not isinstance(value, bool)]
        lines += [scores["notes"][place][k]] if scores.get("notes") and scores["notes"][place][k] else []
        file = result["folder"] / name
        image = f'<img loading="lazy" alt="" src="{picture(file)}">' if file.is_file() else "missing"
        figures.append(f"<figure{mark}>{image}<figcaption>{'<br>'.join(map(escape, lines))}</figcaption></figure>")
    title = f"<b>{escape(result['name'])}</b>"
    return f'<div class="model">{title}<div class="pictures">{"".join(figures)}</div></div>'


def escape(text):
    return html.escape(str(text))


def compare(paths, out, most=MOST):
    """Write the page to `out` -> the Markdown table. Raises UserError."""
    results = [read(path) for path in paths]
    rows = table(results)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(results, rows, most), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--report {out}: {e.strerror}") from None
    return markdown(rows)
