"""Metric tables: a student, its teacher, or the teacher at few steps, on the toy's held-out prompts, or on a file of prompts.

python evaluate.py --run runs/NAME --steps 4
python evaluate.py --teacher --model toy/sdxl --steps 50
python evaluate.py --undistilled --model toy/sdxl --steps 4
python evaluate.py --run runs/NAME --prompts coco10k.txt --images DIR        the paper's tables (benchmark.py)
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean

import torch

import benchmark
import data
import metrics
import run_folder
from config import Config, at_least
from diffusion import guided
from latent_reward import LatentRewardModel
from models import UserError, generate, load_denoiser, load_encoder, load_vae, part_of


def evaluate(denoiser, encoder, vae, clip, source, steps, num, seed, ode, nfe, reference="real", teacher=None, R=None):
    """Metrics of `num` pictures for the source's held-out prompts, as a dict (the keys of --json)."""
    reals, prompts = source.held_out(0, num)
    began = time.time()
    images = generate(denoiser, encoder, vae, prompts, steps, seed, ode=ode)
    seconds = (time.time() - began) / num
    compared = reals if reference == "real" else generate(teacher, encoder, vae, prompts, 50, seed + 1, ode=True)
    features, features_ref = clip.features(images.to(clip.device)), clip.features(compared.to(clip.device))
    precision, recall = metrics.precision_recall(features, features_ref)
    whole, attributes = source.judge(images, prompts) if source.judge else ([], {})
    return {
        "prompt_accuracy": sum(whole) / num if whole else None,
        "attribute_accuracy": {k: sum(v) / len(v) for k, v in sorted(attributes.items())},
        "frechet": metrics.frechet(features, features_ref),
        "precision": precision,
        "recall": recall,
        "clip_score": clip.score(features, prompts).mean().item(),
        "reward": R.judge(vae.encode(images.to(clip.device)), prompts).mean().item() if R else None,
        "saturation": metrics.saturation(images),
        "contrast": metrics.contrast(images),
        "nfe": nfe,
        "seconds_per_image": seconds,
        "num": num,
        "seed": seed,
        "real": {"saturation": metrics.saturation(reals), "contrast": metrics.contrast(reals)},
    }


def on_prompts(args, denoiser, encoder, vae, clip, made_by, nfe):
    """The paper's scores of pictures for a file of prompts, as a dict; prints the paper's rows and ours."""
    if not args.images:
        raise UserError("--prompts needs --images, a folder for the pictures")
    prompts = benchmark.read_prompts(args.prompts, args.num)
    means = benchmark.imported(args.scores, len(prompts))
    pick = metrics.Clip(args.pick, clip.device) if args.pick else None
    benchmark.draw(denoiser, encoder, vae, prompts, args.images, made_by)
    for column, model in [("CLIP", clip), *([("Pick", pick)] if pick else [])]:
        means[column] = mean(benchmark.cosine_scores(model, prompts, args.images))
    print(benchmark.table(made_by["model"], nfe, means))
    return means | {"nfe": nfe, "num": len(prompts), "seed": args.seed}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", default="", help="a student's run folder (default: the newest under runs/)")
    what.add_argument("--teacher", action="store_true", help="the guided multi-step teacher")
    what.add_argument("--undistilled", action="store_true", help="the guided teacher in the student's few-step sampler")
    parser.add_argument("--model", default=Config.model, help=f"pipeline folder of --teacher and --undistilled (default: {Config.model})")
    parser.add_argument("--steps", type=at_least(1), help="sampling steps (default: the student's, 50 for --teacher, 4 for --undistilled)")
    parser.add_argument("--loops", type=at_least(1), help="--run: the checkpoint of this loop (default: the newest)")
    parser.add_argument("--guidance", type=float, default=Config.teacher_guidance, help=f"the teacher's (default: {Config.teacher_guidance})")
    parser.add_argument("--resolution", type=int, default=Config.resolution, help=f"of --teacher and --undistilled (default: {Config.resolution})")
    parser.add_argument("--clip", help=f"the CLIP that measures: a folder or a hub name (default: the run's; {Config.clip})")
    parser.add_argument("--num", type=at_least(1), help="prompts (default: 1000 held-out ones, or all of --prompts)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--reference", choices=("real", "teacher"), default="real", help="what Fréchet distance, precision and recall compare with")
    parser.add_argument("--reward", help='folder of the latent reward model (default: the run\'s, or "lrm" beside the model, if there is one)')
    parser.add_argument("--prompts", help="a text file, one prompt per line: the paper's scores in place of the toy's")
    parser.add_argument("--images", help="--prompts: folder of the pictures; those that it has are not drawn again")
    parser.add_argument("--pick", help="--prompts: PickScore's folder or hub name (yuvalkirstain/PickScore_v1)")
    parser.add_argument("--scores", nargs="+", default=[], help="--prompts: JSON files of scores that were made elsewhere (lab/external_scores.py)")
    parser.add_argument("--json", help="write the metrics to this file too")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        num = args.num if args.num is not None else 1000
        if num < 8 and not args.prompts:
            raise UserError("--num must be at least 8: the metrics compare distributions")
        config, student = {"model": args.model, "data": Config.data, "resolution": args.resolution, "clip": Config.clip}, None
        trained = not (args.teacher or args.undistilled)
        steps = args.steps if args.steps is not None else 50 if args.teacher else 4
        if trained:
            run, config = run_folder.find_run(args.run)
            steps, student = config["student_steps"] if args.steps is None else args.steps, run_folder.checkpoint_at(run, args.loops)
        model = config["model"]
        encoder, vae = load_encoder(model, config["resolution"], device), load_vae(model, device)
        clip = metrics.Clip(args.clip or config["clip"], device)
        drawer, teacher, nfe = None, None, steps
        if not trained or args.reference == "teacher":
            net = load_denoiser(model, device)
            net.net.eval()
            drawer = teacher = guided(net, encoder.null(), args.guidance)
            nfe = steps * (2 if args.guidance != 1 else 1)
        if trained:
            drawer, nfe = load_denoiser(model, device, student=student), steps
            drawer.net.eval()
        if args.prompts:
            made_by = {"model": str(student or model), "resolution": config["resolution"], "steps": steps, "seed": args.seed, "ode": args.teacher}
            # a run of the same name may be another one
            made_by |= {"saved": (student / "progress.json").stat().st_mtime} if trained else {"guidance": args.guidance}
            result = on_prompts(args, drawer, encoder, vae, clip, made_by, nfe)
        else:
            source = data.source(config["data"], config["resolution"])
            if source.held_out is None:
                raise UserError(f"{config['data']} has no held-out part to evaluate on: give a file of --prompts")
            beside = str(Path(model).parent / "lrm") if part_of(model) == "unet" else ""  # one of SDXL's latents
            reward = args.reward or config.get("reward") or beside
            found = args.reward or reward and Path(reward).is_dir()
            R = LatentRewardModel.from_pretrained(reward, config["resolution"], model, device) if found else None
            result = evaluate(drawer, encoder, vae, clip, source, steps, num, args.seed, args.teacher, nfe, args.reference, teacher, R)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, indent=2)
    print(text)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
