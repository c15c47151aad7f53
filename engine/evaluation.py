"""evaluate.py's metrics of a student or a teacher on held-out prompts, and the paper's scores on a file of prompts."""

import os
import time

import torch
from tqdm import tqdm

from diffusion import guided
from engine import benchmark, data, metrics, report, reward_layout
from engine.distributed import start_process
from engine.errors import UserError
from engine.models import load_denoiser, load_vae
from engine.pictures import device_of, generate
from engine.prompt_set import name_of
from engine.prompts import encoder_of
from engine.reward_model import load_reward_model


def run(args, student, config, steps, prompt_set=None, made_by=None):
    """The metrics that evaluate.py's flags name, as a dict; None on other ranks than the first.

    student: its checkpoint folder, or None for the teacher; config: the run's settings as a dict; steps: the sampler's;
    prompt_set: the PromptSet of --prompts; made_by: what its pictures depend on. Raises UserError.
    """
    rank, ranks = 0, int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        rank, ranks, device = start_process()
    else:
        device = device_of(args.device)
    guided_twice = student is None and args.guidance != 1
    nfe = steps * (2 if guided_twice else 1)
    if prompt_set:
        load = lambda: networks(args, student, config, device)[:3]  # noqa: E731
        result = benchmark.run(args, prompt_set, made_by, load, config["clip"], device, rank, ranks)
        if result is None:
            return None
        result = {"name": name(args, student, config, steps), "nfe": nfe} | result
        print(report.markdown(report.table([result])))
        return result
    denoiser, encoder, vae, teacher = networks(args, student, config, device)
    clip = metrics.Clip(args.clip or config["clip"], device)
    source = data.source(config["data"], config["resolution"])
    if source.held_out is None:
        raise UserError(f"{config['data']} has no held-out part to evaluate on: give a file of --prompts")
    R = reward_of(args, config, device)
    num = 1000 if args.num is None else args.num
    how = {"steps": steps, "num": num, "seed": args.seed, "ode": args.teacher, "nfe": nfe}
    return evaluate(denoiser, encoder, vae, clip, source, reference=args.reference, teacher=teacher, R=R, **how)


def networks(args, student, config, device):
    """-> what draws, the prompt encoder, the VAE, and the guided teacher where it is needed, else None."""
    model = config["model"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    how = {"resolution": config["resolution"], "weights": dtype}
    encoder = encoder_of(config, device, dtype)
    vae = load_vae(model, device)
    teacher = None
    if student is None or args.reference == "teacher" and not args.prompts:
        net = load_denoiser(config.get("teacher") or model, device, dtype, **how)
        net.net.eval()
        teacher = guided(net, encoder.null(), args.guidance)
    if student is None:
        return teacher, encoder, vae, teacher
    denoiser = load_denoiser(model, device, dtype, student=student, **how)
    denoiser.net.eval()
    return denoiser, encoder, vae, teacher


def name(args, student, config, steps):
    """The name of a result, in tables and pages."""
    kind = "" if student else " teacher" if args.teacher else " undistilled"
    return f"{name_of(student or config['model'])}{kind}, {steps} step{'s' * (steps > 1)}"


def reward_of(args, config, device):
    """The latent reward model: --reward, the run's, or the one beside the model; None where there is none."""
    model = config["model"]
    reward = args.reward or config.get("reward") or reward_layout.beside(model)
    if args.reward or reward_layout.exists(reward):
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
