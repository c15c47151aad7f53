"""GenEval (Ghosh, Hajishirzi, Schmidt 2023): its prompts, its rules on detected objects, its scores. No torch here.

A prompt's entry is a line of evaluation_metadata.jsonl: {"tag": task, "prompt": text, "include": [{"class", "count",
perhaps "color", perhaps "position": [relation, index of an earlier one]}], perhaps "exclude": [{"class", "count"}]}.
A detection is {"class": name, "score": s, "box": [x0, y0, x1, y1] in pixels, perhaps "color"}.
engine/detector.py makes the detections.
"""

import json
from statistics import mean

from engine import text
from engine.errors import UserError

CLASSES = [  # COCO's 80 in its order, by GenEval's names
    *"person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign".split(","),
    *"parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella".split(","),
    *"handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove".split(","),
    *"skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple".split(","),
    *"sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed".split(","),
    *"dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave".split(","),
    *"oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(","),
]
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3  # of a detection's score
COUNTING = 0.9  # the same in the task "counting"
MOST = 16  # detections of one class
PER_PROMPT = 4  # pictures
PAPER = {  # GenEval's Table 2 and the SD3 paper's Table 5; name: overall, then TASKS
    "SD 2.1": (0.50, 0.98, 0.51, 0.44, 0.85, 0.07, 0.17),
    "SDXL": (0.55, 0.98, 0.74, 0.39, 0.85, 0.15, 0.23),
    "DALL-E 3": (0.67, 0.96, 0.87, 0.47, 0.83, 0.43, 0.45),
    "SD3 (8 B, 1024 px, DPO)": (0.74, 0.99, 0.94, 0.72, 0.89, 0.33, 0.60),
}


def read(path):
    """The entries of evaluation_metadata.jsonl. Raises UserError with the line that is not one."""
    entries = []
    for number, line in text.lines(path):
        try:
            entry = json.loads(line)
            check(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            why = f"it lacks {e}" if isinstance(e, KeyError) else e
            raise UserError(f"--prompts {path}, line {number}: {why} (GenEval's evaluation_metadata.jsonl)") from None
        entries.append(entry)
    if not entries:
        raise UserError(f"--prompts {path} holds no prompt (GenEval's evaluation_metadata.jsonl)")
    return entries


def check(entry):
    """Raises ValueError, KeyError or TypeError for what is no entry."""
    if entry["tag"] not in TASKS:
        raise ValueError(f"unknown tag {entry['tag']!r}")
    if not isinstance(entry["prompt"], str) or not entry["prompt"].strip():
        raise ValueError("its prompt is no text")
    for i, wanted in enumerate(entry["include"]):
        relation, target = wanted.get("position") or ("above", -1)
        known = wanted.get("color", COLORS[0]) in COLORS and relation in RELATIONS
        if not known or "position" in wanted and target not in range(i):
            raise ValueError(f"unknown colour, relation or object in {wanted}")
    for wanted in entry["include"] + entry.get("exclude", []):
        if wanted["class"] not in CLASSES or not isinstance(wanted["count"], int) or wanted["count"] < 1:
            raise ValueError(f"unknown class or count in {wanted}")


def counted(entry, detections, name):
    """The detections of class `name` that count, best first. Of equal scores the later comes first, as published."""
    threshold = COUNTING if entry["tag"] == "counting" else THRESHOLD
    found = [d for d in detections if d["class"] == name and d["score"] > threshold]
    return sorted(found, key=lambda d: d["score"])[::-1][:MOST]


def to_color(entry, detections):
    """The detections whose colour decides: those of each coloured object that was found `count` times."""
    needed = []
    for wanted in entry["include"]:
        found = counted(entry, detections, wanted["class"])[: wanted["count"]]
        if "color" in wanted and len(found) == wanted["count"]:
            needed += [d for d in found if not any(d is other for other in needed)]
    return needed


def relations(a, b):
    """Where box a is, seen from box b -> a set of RELATIONS: of none, one or two.

    With d the offset of the centres, |d| is shortened on each axis by a tenth of both boxes' sizes, and is then
    compared with half of ‖d‖.
    """
    d = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    shortened = [max(abs(offset) - 0.1 * size, 0) * (1 if offset > 0 else -1) for offset, size in zip(d, sizes)]
    if all(abs(s) < 1e-3 for s in shortened):
        return set()
    length = (d[0] ** 2 + d[1] ** 2) ** 0.5
    u, v = (s / length for s in shortened)
    holds = {"left of": u < -0.5, "right of": u > 0.5, "above": v < -0.5, "below": v > 0.5}
    return {relation for relation in RELATIONS if holds[relation]}


def mistakes(entry, detections):
    """What is wrong with a picture, a list of texts: empty for a right one."""
    wrong = []
    matched = []  # per entry of "include" its detections, None where it is wrong
    for wanted in entry["include"]:
        name = wanted["class"]
        found = counted(entry, detections, name)[: wanted["count"]]
        why = ""
        if len(found) < wanted["count"]:
            why = f"{len(found)} of {wanted['count']} {name}"
        elif "color" in wanted and any(d.get("color") != wanted["color"] for d in found):
            why = f"{name}: {', '.join(str(d.get('color')) for d in found)}, not {wanted['color']}"
        elif "position" in wanted:
            relation, index = wanted["position"]
            others = matched[index]
            related = others and all(relation in relations(a["box"], b["box"]) for a in found for b in others)
            why = "" if related else f"{name} not {relation} {entry['include'][index]['class']}"
        matched.append(None if why else found)
        wrong += [why] * bool(why)
    for unwanted in entry.get("exclude", []):
        n = len(counted(entry, detections, unwanted["class"]))
        if n >= unwanted["count"]:
            wrong.append(f"{n} {unwanted['class']}, fewer than {unwanted['count']} allowed")
    return wrong


def scores(entries, right):
    """The published scores. right: per prompt a list of whether each picture is right.

    -> {"geneval": mean over the tasks, "geneval_tasks": {task: share of right pictures}, "geneval_pictures": share of
    all pictures, "geneval_prompts": share of prompts with a right picture}
    """
    tasks = {task: [r for e, rs in zip(entries, right) if e["tag"] == task for r in rs] for task in TASKS}
    shares = {task: mean(map(float, rs)) for task, rs in tasks.items() if rs}
    return {
        "geneval": mean(shares.values()),
        "geneval_tasks": shares,
        "geneval_pictures": mean(float(r) for rs in right for r in rs),
        "geneval_prompts": mean(float(any(rs)) for rs in right),
    }
