"""The walkthrough's pictures of sampling: Eq. 1, 2 and 8, candidates of Eq. 12 and 13, few steps beside many."""

import textwrap
from itertools import count

import torch

import latent_reward
from diffusion import add_noise, backward_simulation, noise_to_step, reverse_step, sample_ode, times
from engine import run_folder
from engine.config import Config
from engine.errors import UserError
from engine.models import load_denoiser
from lab import figures_canvas as canvas
from lab import figures_shared as shared
from lab import rows, steps
from toy import world


@torch.no_grad()
def noise_levels():
    """Eq. 1 and 2: a scene noised, the teacher's clean estimates of it, and the teacher's own way back."""
    schedule = shared.student().schedule
    columns = torch.tensor([49, 249, 499, 749, 999])
    x_0, c = shared.real_latents(1, first=shared.SCENE)
    n = len(columns)
    many = {k: v.expand(n, *v.shape[1:]) for k, v in c.items()}
    x_t = add_noise(schedule, x_0.expand(n, -1, -1, -1), columns, shared.noise(1, "noise levels").expand(n, -1, -1, -1))
    estimates = shared.teacher()(x_t, columns, many)

    z = shared.noise(1, "way back")
    steps = schedule.sampler_steps(50)
    way = {}
    for i, t in enumerate(steps):
        way[int(t)] = z
        x = shared.teacher()(z, times(t, z), c)
        z = x if i == 49 else reverse_step(schedule, z, x, times(t, z), times(steps[i + 1], z))
    back = [way[min(way, key=lambda t: abs(t - int(column)))] for column in columns]

    clean = shared.decode(x_0)
    rows = [
        [clean[0], *shared.decode(x_t)],
        [None, *shared.decode(estimates)],
        [shared.decode(z)[0], *shared.decode(torch.cat(back))],
    ]
    alpha, sigma = schedule.alpha(columns).flatten(), schedule.sigma(columns).flatten()
    titles = ["data", *(f"t = {t}\nα = {a:.2f}, σ = {s:.2f}" for t, a, s in zip(columns, alpha, sigma))]
    labels = [
        "Eq. 1:\na scene,\nnoised  →",
        "what the teacher\nsees in it:\n$x_0$ of $x_t$",
        "Eq. 2:\n50 steps\nfrom noise  ←",
    ]
    return canvas.grid(rows, titles, labels, top=0.5)[0]


@torch.no_grad()
def rollout():
    """Eq. 8: the student's four steps, its input and its clean estimate at each; the undistilled teacher's below."""
    _, c = shared.prompts(shared.SCENE)
    S = shared.student().schedule.steps(4)
    way = []
    for G in (shared.student(), shared.teacher()):
        rng = shared.generators(1, "rollout steps", 1)
        x_t = shared.noise(1, "rollout", 1)
        for i, t in enumerate(S):
            x_0 = G(x_t, times(t, x_t), c)
            way.append((x_t, x_0))
            x_t = noise_to_step(G.schedule, x_0, S, i + 1, rng)
    ours, theirs = way[:4], way[4:]
    rows = [
        [shared.decode(x_t)[0] for x_t, _ in ours],
        [shared.decode(x_0)[0] for _, x_0 in ours],
        [shared.decode(x_0)[0] for _, x_0 in theirs],
    ]
    labels = [
        "$x_τ$: noise, then\nthe estimate\nre-noised",
        "the student's\n$x_0 = G(x_τ, τ)$",
        "the undistilled\nteacher's $x_0$,\nsame noise",
    ]
    titles = [f"step {i + 1}: τ = {t}" for i, t in enumerate(S.tolist())]
    figure, boxes = canvas.grid(rows, titles, labels, left=2.2, top=0.32)
    for j in range(3):  # from an estimate to the next input: noise
        canvas.arrow(figure, boxes[1][j], boxes[0][j + 1])
    return figure


def preference():
    """Eq. 12 and 13: four candidates of one z_t, R's scores, the pair, and where updates on that pair move G."""
    G, S = shared.student(), shared.student().schedule.steps(4)
    words, c = shared.prompts(shared.SCENE)
    c_R = shared.reward().encoder.encode(words)
    for seed in count():  # the first noise whose pair is kept
        z = shared.noise(1, "preference", seed)
        rng = shared.generators(1, "preference steps", seed)
        ((_, z_t, candidates, scores),) = latent_reward.rollout(G, shared.reward(), z, c, c_R, S, 1, 4, "random", rng)
        win, lose, kept = (v.item() for v in latent_reward.choose(scores, Config.pair_threshold))
        if kept:
            break
    pair = candidates[:, win], candidates[:, lose]
    with torch.no_grad():
        futures = G(candidates[0], times(S[1], candidates[0]), {k: v.expand(4, *v.shape[1:]) for k, v in c.items()})
    before, after, H = moved(z_t, *pair, S[0], S[1], c)
    along = torch.cosine_similarity((after - before).flatten(), (pair[0] - pair[1]).flatten(), 0)

    figure, boxes = canvas.canvas([None] * 3, left=1.5, top=0.32, bottom=0.3, gap=0.24, columns=5)
    words = [f"$z_t$, and four\ncandidates $z_s$\nat s = {int(S[1])}", "what G makes\nof each in\nits next step"]
    for row, text in zip(boxes, (*words, "12 updates on\nthis pair alone")):
        canvas.label(figure, row[0], text)
    canvas.put(figure, boxes[0][0], shared.decode(z_t)[0], f"$z_t$, t = {int(S[0])}")
    canvas.put(figure, boxes[1][0], shared.decode(before)[0], under="$x_0 = G(z_t, t)$")
    for k in range(4):
        frame = {win: canvas.REAL, lose: canvas.MADE}.get(k)
        under = f"R = {scores[0, k]:.2f}" + {win: "  $z^w$", lose: "  $z^l$"}.get(k, "")
        canvas.put(figure, boxes[0][k + 1], shared.decode(candidates[0])[k], under=under, frame=frame)
        canvas.put(figure, boxes[1][k + 1], shared.decode(futures)[k], frame=frame)
    old, new, towards = (shared.decode(x)[0] for x in (before, after, before + 0.3 * (pair[0] - pair[1])))
    last = {"before": old, "after": new, "change, times 4": canvas.change(old, new, 4)}
    last["where $z^w - z^l$ points"] = canvas.change(old, towards, 2)
    for box, (under, image) in zip(boxes[2], last.items()):
        canvas.put(figure, box, image, under=under)
    x, y, _, h = boxes[2][4]
    said = f"H = {H:+.2f} nats\nafter the updates,\n0 before.\nThe change's cosine\nto $z^w - z^l$: {along:.2f}"
    figure.text(x - 0.005, y + h / 2, said, va="center", fontsize=9)
    return figure


def moved(z_t, z_win, z_lose, t, s, c, updates=12):
    """A copy of the student after updates by Eq. 12 on one pair -> its estimate of z_t before and after, and H."""
    G = load_denoiser(Config.model, student=run_folder.SHIPPED)
    G.net.eval()
    optimizer = torch.optim.AdamW(G.net.parameters(), lr=Config.rl_lr)
    for _ in range(updates):
        optimizer.zero_grad()
        H, _ = latent_reward.pair_terms(G, shared.student(), z_t, z_win, z_lose, t, s, c)
        latent_reward.loss(H, Config.beta).sum().backward()
        optimizer.step()
    with torch.no_grad():
        H, _ = latent_reward.pair_terms(G, shared.student(), z_t, z_win, z_lose, t, s, c)
        return shared.student()(z_t, times(t, z_t), c), G(z_t, times(t, z_t), c), H.item()


@torch.no_grad()
def few_steps():
    """Algorithm 1: the teacher's 50 steps, and students of fewer steps, from the same noise.

    Raises UserError where a student is not there.
    """
    names = [f"sdxl-{K}" for K in steps.STEPS]
    runs = [rows.folder(steps.name(name, 0, rows.NUM)) for name in names]
    if not all(map(run_folder.newest, runs)):
        wanted = f"python -m lab.steps --only {' '.join(names)} --seeds 0"
        raise UserError(f"few-steps: draws students that take half an hour to train: {wanted}")
    which = (0, 3, 5, 8, 13, 21)
    words, c = shared.prompts(*which)
    z = shared.noise(len(which), "few steps")
    rng = lambda: shared.generators(len(which), "few steps' noise")  # noqa: E731
    drawn = {"teacher,\n50 guided steps": sample_ode(shared.teacher(), z, c, 50)}
    for K, run in zip(steps.STEPS, runs):
        G = load_denoiser(Config.model, student=run_folder.newest(run))
        G.net.eval()
        drawn[f"student,\n{K} step{'s' * (K > 1)}"] = backward_simulation(G, z, c, G.schedule.steps(K), rng())
    w = Config.guidance
    S = shared.student().schedule.steps(4)
    drawn[f"undistilled,\n4 steps, w = {w:g}"] = backward_simulation(shared.teacher(w), z, c, S, rng())
    pictures = {name: shared.decode(x_0) for name, x_0 in drawn.items()}
    labels = [f"{name}\n{sum(world.judge(p, words)[0])} of {len(words)} right" for name, p in pictures.items()]
    titles = ["\n".join(textwrap.wrap(w, 20)) for w in words]
    return canvas.grid([list(p) for p in pictures.values()], titles, labels, top=0.75)[0]
