"""evaluate.py's metrics of a student or a teacher on held-out prompts, and the paper's scores on a file of prompts."""

import time
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from diffusion import guided
from engine import benchmark, data, metrics, picture_folder, stopping
from engine.errors import UserError
from engine.folders import HERE, part_of
from engine.models import load_denoiser, load_vae
from engine.pictures import device_of, draw, generate
from engine.prompts import load_encoder
from engine.reward_model import load_reward_model


def run(args, student, config, steps, made_by=None):
    """The metrics that evaluate.py's flags name, as a dict.

    student: its checkpoint folder, or None for the teacher; config: the run's settings as a dict; steps: the sampler's;
    made_by: what the pictures of --prompts depend on. Raises UserError.
    """
    device = device_of(args.device)
    model = config["model"]
    encoder = load_encoder(model, config["resolution"], device)
    vae = load_vae(model, device)
    clip = metrics.Clip(args.clip or config["clip"], device)
    teacher = None
    if student is None or args.reference == "teacher":
        net = load_denoiser(model, device)
        net.net.eval()
        teacher = guided(net, encoder.null(), args.guidance)
    if student is None:
        denoiser = teacher
        nfe = steps * (2 if args.guidance != 1 else 1)
    else:
        denoiser = load_denoiser(model, device, student=student)
        denoiser.net.eval()
        nfe = steps
    if args.prompts:
        return on_prompts(args, denoiser, encoder, vae, clip, made_by, nfe)
    source = data.source(config["data"], config["resolution"])
    if source.held_out is None:
        raise UserError(f"{config['data']} has no held-out part to evaluate on: give a file of --prompts")
    R = reward_of(args, config, device)
    num = 1000 if args.num is None else args.num
    how = {"steps": steps, "num": num, "seed": args.seed, "ode": args.teacher, "nfe": nfe}
    return evaluate(denoiser, encoder, vae, clip, source, reference=args.reference, teacher=teacher, R=R, **how)


def reward_of(args, config, device):
    """The latent reward model: --reward, the run's, or "lrm" beside the model; None where there is none."""
    model = config["model"]
    beside = str(Path(model).parent / "lrm") if part_of(model) == "unet" else ""  # one of SDXL's latents
    reward = args.reward or config.get("reward") or beside
    if args.reward or reward and any((root / reward).is_dir() for root in (Path(), HERE)):
        return load_reward_model(reward, config["resolution"], model, device)
    return None


def evaluate(denoiser, encoder, vae, clip, source, steps, num, seed, ode, nfe, reference="real", teacher=None, R=None):
    """Metrics of `num` pictures for the source's held-out prompts, as a dict (the keys of --json)."""
    reals, prompts = source.held_out(0, num)
    began = time.time()
    images = generate(denoiser, encoder, vae, prompts, steps, seed, ode=ode, bar="pictures")
    seconds = (time.time() - began) / num
    compared = reals
    if reference == "teacher":
        compared = generate(teacher, encoder, vae, prompts, 50, seed + 1, ode=True, bar="the teacher's pictures")
    with tqdm(total=4, desc="scores") as bar:
        features = clip.features(images.to(clip.device))
        features_ref = clip.features(compared.to(clip.device))
        bar.update()
        precision, recall = metrics.precision_recall(features, features_ref)
        bar.update()
        right, attributes = source.judge(images, prompts) if source.judge else ([], {})
        bar.update()
        reward = R.score_finished(vae.encode(images.to(clip.device)), prompts).mean().item() if R else None
        bar.update()
    return {
        "prompt_accuracy": sum(right) / num if right else None,
        "attribute_accuracy": {k: sum(v) / len(v) for k, v in sorted(attributes.items())},
        "frechet": metrics.frechet(features, features_ref),
        "precision": precision,
        "recall": recall,
        "clip_score": clip.score(features, prompts).mean().item(),
        "reward": reward,
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
    prompts = made_by["prompts"]
    means = benchmark.imported(args.scores, len(prompts))
    scorers = {"CLIP": clip}
    if args.pick:
        scorers["Pick"] = metrics.Clip(args.pick, clip.device)
    picture_folder.begin(args.images, made_by)
    there = lambda: len(prompts) - len(picture_folder.missing(args.images, len(prompts)))  # noqa: E731
    stopping.last_words = lambda: (
        f"{there()} of {len(prompts)} pictures are in {args.images}; the same command goes on from there"
    )
    draw(args.images, denoiser, encoder, vae, prompts, made_by["steps"], args.seed, ode=args.teacher)
    picture_folder.end(args.images)
    for column, scorer in scorers.items():
        means[column] = mean(benchmark.cosine_scores(scorer, prompts, args.images))
    print(benchmark.table(made_by["model"], nfe, means))
    return means | {"nfe": nfe, "num": len(prompts), "seed": args.seed}
