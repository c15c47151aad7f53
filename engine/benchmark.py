"""Scores of pictures for a set of prompts (4.1, GenEval, DPG-Bench): drawn, judged, summed up, beside the papers' rows.

    python evaluate.py --run runs/NAME --prompts coco10k.txt --images DIR \\
        [--pick yuvalkirstain/PickScore_v1] [--scores DIR/hpsv2.json ...]
    python evaluate.py --run runs/NAME --benchmark geneval --prompts evaluation_metadata.jsonl --images DIR --judge PATH
    python evaluate.py --run runs/NAME --benchmark dpg --prompts dpg_bench --images DIR --judge PATH

A stopped call goes on where it was: pictures and judgements are files of DIR, written as soon as they are there. Under
torchrun the ranks share the work; pictures are the same on any number. CLIP score and PickScore are cosines of CLIP
embeddings, as the paper prints them (without PickScore's factor of 100). HPSv2.1, ImageReward and MPS need packages
with old dependencies: lab/external_scores.py scores DIR in a separate environment, and --scores reads its JSON.
"""

import json
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine import dpg, features, geneval, metrics, picture_folder, stopping
from engine.detector import Colors, Detector, look
from engine.distributed import barrier, from_rank_0, gathered
from engine.judge import Judge
from engine.pictures import draw, read_picture
from engine.prompt_set import answer_files, imported, name_of, slug

COLOR_CLIP = "openai/clip-vit-large-patch14"  # GenEval's


def run(args, prompt_set, made_by, load, clip_path, device, rank, ranks):
    """Draw and score a PromptSet -> the result as a dict, on rank 0; None on others.

    made_by: what the pictures depend on; load() -> denoiser, prompt encoder, VAE; clip_path: the run's CLIP.
    Raises UserError.
    """
    folder = Path(args.images)
    answers_from = answer_files(args.scores) if prompt_set.kind == "dpg" else []
    means, each = imported([path for path in args.scores if path not in answers_from], len(prompt_set.prompts))
    judged = dpg.read_answers(answers_from[0], prompt_set.items, prompt_set.per_prompt) if answers_from else None
    draw_missing(args, prompt_set, made_by, load, folder, rank, ranks)
    files = [[folder / name for name in names] for names in prompt_set.names()]

    result, notes = {}, [[""] * prompt_set.per_prompt for _ in files]
    columns = {}  # name -> [[score per picture] per prompt]
    clip = None
    if args.clip or not prompt_set.kind or prompt_set.kind == "geneval" and args.judge:
        clip = metrics.Clip(args.clip or (COLOR_CLIP if prompt_set.kind else clip_path), device)
    if prompt_set.kind == "geneval" and args.judge:
        result, columns["right"], notes = by_geneval(args, prompt_set, files, clip, device, rank, ranks)
    if prompt_set.kind == "dpg" and (judged or args.judge):
        result, columns["DPG"], notes = by_dpg(args, prompt_set, files, judged, device, rank, ranks)
    elif prompt_set.kind == "dpg" and rank == 0:
        grids(prompt_set, files, folder / "grids")
    for column, scorer in {"CLIP": clip, "Pick": args.pick and metrics.Clip(args.pick, device)}.items():
        if scorer:
            each[column] = cosine_scores(scorer, prompt_set.prompts, sum(files, []), rank, ranks)
            means[column] = mean(each[column])
    columns |= {name: grouped(values, prompt_set.per_prompt) for name, values in each.items()}
    found = {path: features_of(path, sum(files, []), device, rank, ranks) for path in args.features}
    if rank:
        return None
    for path, values in found.items():
        result |= spread_and_distance(args, path, *values, prompt_set.per_prompt, folder)
    prompts = [item["prompt"] for item in prompt_set.items]
    scores = {"prompts": prompts, "files": prompt_set.names(), "columns": columns, "notes": notes}
    write_json(folder / "scores.json", scores)
    if prompt_set.kind:
        result = {"benchmark": prompt_set.kind} | result
    result = {"images": args.images, "resolution": made_by["resolution"], **means, **result}
    result |= {"num": len(prompt_set.items), "seed": args.seed}
    return result


def draw_missing(args, prompt_set, made_by, load, folder, rank, ranks):
    """Write the pictures that the folder lacks; networks are loaded only for these."""

    def begin():
        picture_folder.begin(folder, made_by)
        prompt_set.prepare(folder)
        return picture_folder.missing(folder, len(prompt_set.prompts), prompt_set.name)

    lacking = from_rank_0(begin)
    n = len(prompt_set.prompts)
    if lacking:
        there = lambda: n - len(picture_folder.missing(folder, n, prompt_set.name))  # noqa: E731
        stopping.last_words = lambda: f"{there()} of {n} pictures are in {folder}; the same command goes on from there"
        how = {"ode": args.teacher, "name": prompt_set.name, "lacking": lacking, "part": (rank, ranks)}
        draw(folder, *load(), prompt_set.prompts, made_by["steps"], args.seed, **how)
    barrier()
    if rank == 0:
        picture_folder.end(folder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # a judge may need all of it
    stopping.last_words = lambda: f"all pictures are in {folder}; the same command goes on with their scores"


def judgements(judge, prompt_set, files, where, rank, ranks, whole):
    """judge(item, path) of every picture, [[answer per picture] per prompt]; an item's are kept in where/ID.json.

    whole(item, answers): whether a kept file has all.
    """

    def kept(item):
        path = where / f"{item['id']}.json"
        answers = json.loads(path.read_text()) if path.is_file() else []
        return answers if len(answers) == prompt_set.per_prompt and whole(item, answers) else None

    def lacking():
        where.mkdir(parents=True, exist_ok=True)
        return [i for i, item in enumerate(prompt_set.items) if kept(item) is None]

    mine = from_rank_0(lacking)[rank::ranks]
    for i in tqdm(mine, desc="judged", unit="prompt", disable=rank > 0):
        write_json(where / f"{prompt_set.items[i]['id']}.json", [judge(prompt_set.items[i], path) for path in files[i]])
    barrier()
    return [kept(item) for item in prompt_set.items]


def by_geneval(args, prompt_set, files, clip, device, rank, ranks):
    """-> the published scores, [[whether right per picture] per prompt], [[what is wrong]]."""
    detector, colors = Detector(args.judge, device), Colors(clip)
    names = [args.judge, args.clip or COLOR_CLIP]
    where = Path(args.images) / "-".join(["detections", *map(slug, names)])
    see = lambda item, path: look(detector, colors, item, path)  # noqa: E731
    found = judgements(see, prompt_set, files, where, rank, ranks, lambda item, answers: True)
    wrong = [[geneval.mistakes(item, seen) for seen in pictures] for item, pictures in zip(prompt_set.items, found)]
    right = [[not mistakes for mistakes in pictures] for pictures in wrong]
    result = geneval.scores(prompt_set.items, right) | {"judge": " + ".join(map(name_of, names))}
    return result, right, [["; ".join(mistakes) for mistakes in pictures] for pictures in wrong]


def by_dpg(args, prompt_set, files, judged, device, rank, ranks):
    """-> both sums, [[share of questions per picture] per prompt], [[questions answered "no"]].

    judged: (name, answers) made elsewhere, or None.
    """
    if judged:
        name, answers = judged
    else:
        judge, name = Judge(args.judge, device), name_of(args.judge)
        where = Path(args.images) / f"answers-{slug(args.judge)}"
        all_there = lambda item, kept: all(str(q["id"]) in p for p in kept for q in item["questions"])  # noqa: E731
        found = judgements(judge.look, prompt_set, files, where, rank, ranks, all_there)
        answers = {
            item["id"]: [{int(q): dpg.is_yes(p) for q, p in yes.items()} for yes in pictures]
            for item, pictures in zip(prompt_set.items, found)
        }
    fixed, released = dpg.scores(prompt_set.items, answers), dpg.scores_as_released(prompt_set.items, answers)
    result = {key: fixed[key] for key in ("dpg", "dpg_categories", "dpg_details")} | {"judge": name}
    result |= {"dpg_released": released["dpg"], "dpg_released_categories": released["dpg_categories"]}
    result["dpg_released_items"] = len(released["dpg_items"])
    points, notes = [], []
    for item in prompt_set.items:
        questions, pictures = item["questions"], answers[item["id"]]
        points.append([mean(dpg.zeroed(questions, yes).values()) for yes in pictures])
        noes = [[q["text"] for q in questions if not yes[q["id"]]] for yes in pictures]
        notes.append([f"no: {' '.join(texts[:3])}{' ...' if len(texts) > 3 else ''}" * bool(texts) for texts in noes])
    return result, points, notes


def grids(prompt_set, files, where):
    """Write where/ID.png, four pictures row by row: what DPG-Bench's own program reads."""
    where.mkdir(exist_ok=True)
    for item, paths in zip(prompt_set.items, files):
        images = [Image.open(path) for path in paths[:4]]
        width, height = images[0].size
        sheet = Image.new("RGB", (2 * width, 2 * height))
        for k, image in enumerate(images):
            sheet.paste(image, (k % 2 * width, k // 2 * height))
        sheet.save(where / f"{item['id']}.png")


def cosine_scores(clip, prompts, files, rank=0, ranks=1, batch=64):
    """metrics.Clip's score of each picture file with its prompt: a list, on every rank."""
    found = {}
    firsts = range(0, len(prompts), batch)[rank::ranks]
    for first in tqdm(firsts, desc="scores", disable=rank > 0):
        part = prompts[first : first + batch]
        images = torch.stack([read_picture(path) for path in files[first : first + batch]]).to(clip.device)
        found |= enumerate(clip.score(clip.features(images), part).tolist(), first)
    found = gathered(found)
    return [found[i] for i in range(len(prompts))]


def features_of(path, files, device, rank, ranks):
    """-> the encoder of features.encoder, and the features of all picture files (N, d), on every rank."""
    encode = features.encoder(path, device)
    mine = range(len(files))[rank::ranks]
    bar = "features" if rank == 0 else ""
    some = features.features(encode, [files[i] for i in mine], bar) if mine else []
    found = gathered({i: row.numpy() for i, row in zip(mine, some)})
    return encode, torch.from_numpy(np.stack([found[i] for i in range(len(files))]))


def spread_and_distance(args, path, encode, found, per_prompt, folder):
    """Diversity with its standard error, where DINO sees several pictures of a prompt; the distance to --real.

    The pictures' own statistics go to folder/SLUG.npz, those of --real to folder/real-SLUG.npz: for later calls.
    """
    result = {}
    if per_prompt > 1 and encode.column == "fd_dino":
        result["diversity"], result["diversity_error"] = metrics.mean_and_error(
            metrics.cosine_diversity(found, per_prompt)
        )
        result["diversity_by"] = name_of(path)
    if args.real:
        real = features.reference(encode, args.real)
        result |= features.distances(encode, found, real)
        np.savez(folder / f"real-{slug(path)}.npz", mu=real[1].numpy(), sigma=real[2].numpy())
    if len(found) > 1:
        mu, sigma = metrics.gaussian(found)
        np.savez(folder / f"{slug(path)}.npz", mu=mu.numpy(), sigma=sigma.numpy())
    return result


def grouped(values, n):
    """A flat list -> lists of n."""
    return [values[i : i + n] for i in range(0, len(values), n)]


def write_json(path, content):
    """Write a file aside and rename it: a kill leaves none torn."""
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(content) + "\n")
    aside.rename(path)
