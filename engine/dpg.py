"""DPG-Bench (ELLA, Hu et al. 2024): its prompts, its questions and their dependency graph, its score. No torch here.

A question is {"id", "parents": ids, "kind": "entity - whole", "text"}; an item {"id", "prompt", "questions"} with its
questions in the order of their ids. answers: {item id: [{question id: whether "yes"}, one dict per picture]}.
"""

import csv
import io
import json
from pathlib import Path
from statistics import mean

from engine import text
from engine.errors import UserError

CSV = "dpg_bench.csv"
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
BROAD = ("global", "entity", "attribute", "relation", "other")
PER_PROMPT = 4  # pictures
PAPER = {  # as TokenFlow's Table 2 lists them, judged by mPLUG-large; name: DPG, then BROAD
    "SD 1.5": (63.18, 74.63, 74.23, 75.39, 73.49, 67.81),
    "SDXL": (74.65, 83.27, 82.43, 80.91, 86.76, 80.41),
    "DALL-E 3": (83.50, 90.97, 89.61, 88.39, 90.58, 89.83),
}


def read(path, questions=True):
    """The items of the published folder dpg_bench (prompts/ID.txt and dpg_bench.csv), or of such a csv alone.

    A prompt is that of its text file, where there is one. questions=False: the csv may be missing, for drawing alone.
    Raises UserError.
    """
    path = Path(path)
    table = path / CSV if path.is_dir() else path
    folder = (path if path.is_dir() else path.parent) / "prompts"
    if path.is_dir() and not questions and not table.is_file():
        items = [{"id": file.stem, "questions": []} for file in sorted(folder.glob("*.txt"))]
    else:
        items = read_questions(table)
    for item in items:
        file = folder / f"{item['id']}.txt"
        if file.is_file():
            item["prompt"] = text.decode(text.read(file)).strip()
        if not item.get("prompt"):
            raise UserError(f"--prompts {path}: item {item['id']} has no prompt")
    if not items:
        raise UserError(f"--prompts {path} holds no item (DPG-Bench's folder dpg_bench, or its {CSV})")
    return items


def read_questions(path):
    """The items of dpg_bench.csv, by id. Raises UserError with the row that is wrong."""
    if not path.is_file():
        raise UserError(f"--prompts: no such file: {path} (DPG-Bench's folder dpg_bench, which holds {CSV})")
    rows = csv.DictReader(io.StringIO(text.decode(text.read(path)), newline=""))
    lacking = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if lacking:
        raise UserError(f"--prompts {path} lacks the column {', '.join(lacking)} (DPG-Bench's {CSV})")
    items = {}
    for number, row in enumerate(rows):
        if not any(value and value.strip() for value in row.values() if isinstance(value, str)):
            continue
        item_id = (row["item_id"] or "").strip()
        try:
            if not item_id or Path(item_id).name != item_id:
                raise ValueError(f"item_id {item_id!r} cannot name a file")
            parents = [int(parent) for parent in row["dependency"].split(",")]
            question = {"id": int(row["proposition_id"]), "parents": [parent for parent in parents if parent]}
            question |= {"kind": row["tuple"].split("(")[0].strip(" -"), "first": number == 0}
            question["text"] = row["question_natural_language"].strip()
        except (ValueError, AttributeError) as e:
            raise UserError(f"--prompts {path}, row {number + 1} of item {item_id}: {e}") from None
        item = items.setdefault(item_id, {"id": item_id, "prompt": (row["text"] or "").strip(), "questions": []})
        item["questions"].append(question)
    for item in items.values():
        item["questions"].sort(key=lambda question: question["id"])
        ids = [question["id"] for question in item["questions"]]
        unknown = {parent for question in item["questions"] for parent in question["parents"]} - set(ids)
        if unknown or len(set(ids)) < len(ids):
            fault = f"depends on question {min(unknown)}, which is missing" if unknown else "has a question twice"
            raise UserError(f"--prompts {path}: item {item['id']} {fault}")
    return sorted(items.values(), key=lambda item: item["id"])  # as without a csv: noise goes by place


def zeroed(questions, yes):
    """A picture's answers after its dependencies: {id: 0 or 1}. A question with a parent at 0 becomes 0; zeros cascade.

    yes: {id: whether the answer was "yes"}. Raises KeyError for a parent without an answer.
    """
    points = {question["id"]: int(yes[question["id"]]) for question in questions}
    for question in questions:
        if any(points[parent] == 0 for parent in question["parents"]):
            points[question["id"]] = 0
    return points


def item_score(questions, pictures):
    """Mean over pictures of the mean over questions, in [0, 1]."""
    return mean(mean(zeroed(questions, yes).values()) for yes in pictures)


def scores(items, answers):
    """{"dpg": 100 x mean over items, "dpg_items": {id: score}, "dpg_categories", "dpg_details"}, "fixed".

    Categories pool the answers of all pictures before zeroing, in percent. Raises UserError for an item whose answers
    are not complete.
    """
    found = {}
    pooled = []
    for item in items:
        pictures = answers.get(item["id"])
        complete = pictures and all(q["id"] in yes for yes in pictures for q in item["questions"])
        if not complete:
            raise UserError(f"item {item['id']} has not all of its answers")
        found[item["id"]] = item_score(item["questions"], pictures)
        pooled += [(question["kind"], yes[question["id"]]) for yes in pictures for question in item["questions"]]
    return summed(found, pooled)


def scores_as_released(items, answers):
    """The same as the benchmark's own program counts: comparable with published tables, if its judge is.

    It skips the csv's first row; an item with a question that depends on that one is left out (a KeyError, printed);
    categories are those of an item's last picture.
    """
    found = {}
    pooled = []
    for item in items:
        questions = [question for question in item["questions"] if not question["first"]]
        pictures = answers.get(item["id"])
        try:
            found[item["id"]] = item_score(questions, pictures)
        except (KeyError, TypeError, ValueError):  # a missing parent, no answers, no question left
            continue
        pooled += [(question["kind"], pictures[-1][question["id"]]) for question in questions]
    return summed(found, pooled)


def summed(found, pooled):
    """{item: score} and [(kind, answer)] -> the dict of `scores`."""
    details = {kind: 100 * mean(int(yes) for k, yes in pooled if k == kind) for kind, _ in pooled}
    broad = {kind.split("-")[0].strip() for kind in details}
    of = lambda name: [int(yes) for kind, yes in pooled if kind.split("-")[0].strip() == name]  # noqa: E731
    return {
        "dpg": 100 * mean(found.values()) if found else None,
        "dpg_items": found,
        "dpg_categories": {name: 100 * mean(of(name)) for name in sorted(broad)},
        "dpg_details": dict(sorted(details.items())),
    }


def read_answers(path, items, per_prompt=PER_PROMPT):
    """Answers made elsewhere -> (the judge's name, answers). Raises UserError that names what is missing or wrong.

    A file is {item: [{question: "yes" or another text}, one per picture]}, or {"judge": name, "answers": that}. A
    number counts as the probability of "yes".
    """
    try:
        content = json.loads(text.decode(text.read(path)))
        named = {"judge", "answers"} <= content.keys()
        judge = str(content["judge"]) if named else f"answers of {Path(path).name}"
        given = content["answers"] if named else content
        answers = {i: [{int(q): is_yes(a) for q, a in yes.items()} for yes in given[i]] for i in given}
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(
            f'--scores {path}: {e} (expected {{item: [{{question: "yes" or "no"}} per picture]}})'
        ) from None
    for item in items:
        pictures = answers.get(item["id"])
        if not pictures:
            raise UserError(f"--scores {path}: no answers for item {item['id']}")
        if len(pictures) != per_prompt:
            raise UserError(f"--scores {path}: item {item['id']} has {len(pictures)} pictures, not {per_prompt}")
        missing = [q["id"] for yes in pictures for q in item["questions"] if q["id"] not in yes]
        if missing:
            raise UserError(f"--scores {path}: item {item['id']} lacks the answer to question {missing[0]}")
    return judge, answers


def is_yes(answer):
    """Whether an answer is "yes": exactly that text, true, or a probability above 0.5."""
    if isinstance(answer, str):
        return answer == "yes"
    return float(answer) > 0.5
