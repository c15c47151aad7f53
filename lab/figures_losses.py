"""The walkthrough's pictures of the losses: Eq. 3 to 7 and 9 to 11, from three short runs."""

import torch
import torch.nn.functional as F

import dmd
import pixel_gan
import score_estimator
from diffusion import add_noise, backward_simulation, times
from lab import figures_canvas as canvas
from lab import figures_shared as shared
from toy import world


@torch.no_grad()
def distribution_matching():
    """Eq. 3 and 4: x, noised to three levels, seen by the teacher and by the score estimator; their difference."""
    nets = shared.trained("pull")
    i = 1
    _, c = shared.prompts(shared.SCENE)
    x_tau = backward_simulation(
        nets.G, shared.noise(1, "matching", 3), c, nets.S, shared.generators(1, "matching steps"), 0, i
    )
    x = nets.G(x_tau, times(nets.S[i], x_tau), c)
    eps = shared.noise(1, "matching noise")
    rows, labels = [], []
    for t in (249, 549, 849):
        t = torch.tensor([t])
        x_t = add_noise(nets.G.schedule, x, t, eps)
        x0_real, x0_fake = nets.guided_teacher(x_t, t, c), nets.fake(x_t, t, c)
        g = dmd.gradient(nets.guided_teacher, nets.fake, x, t, eps, c)
        pushed = x - 0.25 * g
        before, after = shared.decode(x), shared.decode(pushed)
        images = [before, *map(shared.decode, (x_t, x0_real, x0_fake)), canvas.change(before, after, 2), after]
        rows.append([image[0] for image in images])
        labels.append(f"renoised\nto t = {t.item()}")
    titles = ["$x = G(x_τ, τ)$", "$x_t$", "$x_0$ real: the\nguided teacher's", "$x_0$ fake: the\nestimator's"]
    titles += ["where $-g$ moves $x$\n(change, on grey)", "$x - g/4$"]
    return canvas.grid(rows, titles, labels, top=0.5)[0]


@torch.no_grad()
def score_loss():
    """Eq. 6: the error of the score estimator over the teacher's, on G's pictures and on real ones."""
    nets = shared.trained("pull")
    ts, n = shared.levels(8), 64
    real, c = shared.real_latents(n, 1000)
    made, _ = shared.made_latents(nets.G, nets.S, n, 1000)
    eps = shared.noise(n, "score noise")
    error = lambda denoiser, y, t: score_estimator.loss(denoiser, y, times(t, y), eps, c).item()  # noqa: E731
    x_t = [add_noise(nets.G.schedule, made[:1], t[None], eps[:1]) for t in ts]
    one = {k: v[:1] for k, v in c.items()}
    strips = [[shared.decode(x)[0] for x in x_t]]
    for denoiser in (nets.teacher, nets.fake):
        strips.append([shared.decode(denoiser(x, t[None], one))[0] for x, t in zip(x_t, ts)])
    labels = ["G's picture,\nnoised", "the teacher's\nclean estimate", "the score\nestimator's"]
    figure, axes = strips_and_plot(strips, labels, ts)
    for name, y, colour in (("on G's pictures", made, canvas.MADE), ("on real scenes", real, canvas.REAL)):
        ratio = [error(nets.fake, y, t) / error(nets.teacher, y, t) for t in ts]
        axes.plot(range(len(ts)), ratio, "o-", color=colour, label=name, markersize=4)
    axes.axhline(1, color="#c8ced6", linewidth=1, zorder=0)
    axes.set_ylabel("Eq. 6: estimator's\nover the teacher's")
    axes.legend(loc="best", fontsize=8)
    return figure


@torch.no_grad()
def latent_gan():
    """Eq. 5 and 7: what DMD2's discriminator sees at each noise level, and how sure it is there."""
    nets = shared.trained("dmd2")
    ts, n = shared.levels(8), 96
    real, c = shared.real_latents(n, 1000)
    made, _ = shared.made_latents(nets.G, nets.S, n, 1000)
    eps = shared.noise(n, "gan noise")
    logits = {"real": [], "made": []}
    for t in ts:
        for name, y in (("real", real), ("made", made)):
            _, features = nets.fake.with_features(add_noise(nets.G.schedule, y, times(t, y), eps), times(t, y), c)
            logits[name].append(nets.D(features))
    strips = [[shared.decode(add_noise(nets.G.schedule, y[:1], t[None], eps[:1]))[0] for t in ts] for y in (real, made)]
    figure, axes = strips_and_plot(strips, ["a real scene,\nnoised", "G's picture,\nnoised"], ts)
    for name, colour in (("real", canvas.REAL), ("made", canvas.MADE)):
        values = torch.stack(logits[name])  # (levels, n)
        low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9]), 1)
        axes.plot(range(len(ts)), middle, "o-", color=colour, label=f"{name}: median of {n}", markersize=4)
        axes.fill_between(range(len(ts)), low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0, color="#c8ced6", linewidth=1, zorder=0)
    axes.set_ylabel("D's logit\n(band: 10 to 90 %)")
    axes.legend(loc="best", fontsize=8)
    return figure


def adversarial_gradient():
    """Eq. 9: where D pushes on G's pictures, and where steps along that push lead."""
    nets = shared.trained("pull")
    made, _ = shared.made_latents(nets.G, nets.S, 5, 40)
    z = made.clone().requires_grad_()
    image = shared.vae().decode(z)
    image.retain_grad()
    nets.D.requires_grad_(False)
    pixel_gan.generator_loss(nets.D(nets.D.features(image))).backward()
    push = image.grad.square().sum(1).sqrt()  # (5, 64, 64)
    y = made.clone()
    for _ in range(10):  # follow it, as G is made to
        y = y.detach().requires_grad_()
        loss = pixel_gan.generator_loss(nets.D(nets.D.features(shared.vae().decode(y))))
        (slope,) = torch.autograd.grad(loss, y)
        y = y - 0.012 * slope / slope.square().mean((1, 2, 3), keepdim=True).sqrt()
    before, after = shared.decode(made), shared.decode(y.detach())
    rows = [list(before), [None] * 5, list(canvas.change(before, after, 3)), list(after)]
    labels = [
        "$V(x_{adv})$:\nwhat D sees",
        "$|∂L_{adv}/∂$pixel$|$",
        "ten steps along\nD's push: change",
        "where they end",
    ]
    figure, boxes = canvas.grid(rows, labels=labels, top=0.1)
    for box, heat in zip(boxes[1], F.avg_pool2d(push, 5, 1, 2)):
        canvas.put(figure, box, heat, cmap="magma")
    return figure


@torch.no_grad()
def discriminator_maps():
    """Eq. 10: D's maps of logits, level by level of SAM, laid over real pictures and over G's."""
    nets = shared.trained("pull")
    made, _ = shared.made_latents(nets.G, nets.S, 2, 42)
    real = torch.stack([world.render(world.scene(i, "test")[0]) for i in (42, 43)])
    figure, boxes = canvas.canvas([None] * 4, left=1.35, top=0.45, columns=5)
    names = [f"after block {i + 1}" for i in nets.D.levels] + ["neck"]
    for row, image in enumerate([real[0], shared.decode(made)[0], real[1], shared.decode(made)[1]]):
        maps = [head(f)[0, 0] for head, f in zip(nets.D.heads, nets.D.features(image[None]))]
        what = ("G's picture", "real")[row % 2 == 0]
        colour = (canvas.MADE, canvas.REAL)[row % 2 == 0]
        mean = torch.cat([m.flatten() for m in maps]).mean()
        canvas.label(figure, boxes[row][0], f"{what}:\nmean logit {mean:+.2f}")
        canvas.put(figure, boxes[row][0], image, "picture" if row == 0 else "", frame=colour)
        for j, (logits, name) in enumerate(zip(maps, names)):
            ax = canvas.put(figure, boxes[row][j + 1], image.mean(0, keepdim=True).expand(3, -1, -1) * 0.5 + 0.4)
            ax.set_title(name if row == 0 else "", fontsize=8.5, pad=4)
            over = ax.imshow(
                logits.numpy(), cmap="RdYlGn", vmin=-2, vmax=2, alpha=0.62, extent=(-0.5, 63.5, 63.5, -0.5)
            )
            ax.text(61, 61, f"{logits.mean():+.2f}", ha="right", va="bottom", fontsize=8, color=canvas.INK)
    x, y, w, h = boxes[3][4]
    bar = figure.add_axes((x + 0.15 * w, y, 0.1 * w, 4 * h))
    figure.colorbar(over, cax=bar, ticks=[-2, -1, 0, 1, 2]).set_label("logit: generated  ←  →  real", fontsize=8.5)
    return figure


def score_lag():
    """Eq. 11: the score estimator's lag behind G, with the pull and without, and what becomes of the colours."""
    figure, boxes = canvas.canvas([2.5], left=0.65, top=0.35, bottom=0.5, gap=0.75, columns=2)
    left, right = (figure.add_axes(box) for box in boxes[0])
    for name, title, colour in (
        ("pull", "with the pull, λ_ema = 0.9", canvas.THIRD),
        ("no-pull", "without", canvas.MADE),
    ):
        lines = [line for line in shared.recorded(name) if "score_lag" in line]
        loops = [line["loops"] for line in lines]
        for ax, key in ((left, "score_lag"), (right, "saturation")):
            values = [line[key] for line in lines]
            ax.plot(loops, values, color=colour, alpha=0.22, linewidth=1)
            ax.plot(loops, canvas.smooth(values, 8), color=colour, linewidth=2, label=title)
    right.plot(
        loops, canvas.smooth([line["saturation_real"] for line in lines], 8), color=canvas.REAL, label="real scenes"
    )
    left.set_yscale("log")
    left.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    left.minorticks_off()
    left.set(xlabel="loops", title="score_lag: Eq. 6 on G's samples over the teacher's on real ones")
    right.set(xlabel="loops", title="saturation of G's samples")
    for ax in (left, right):
        ax.title.set_fontsize(8.5)
        ax.legend(fontsize=8)
    return figure


def strips_and_plot(strips, labels, ts, height=1.9):
    """Strips of pictures, a column per noise level, over a plot with the same columns -> figure, the plot's axes."""
    n = len(ts)
    figure, boxes = canvas.canvas([*[None] * len(strips), height], top=0.3, bottom=0.4, columns=n)
    for i, (strip, words) in enumerate(zip(strips, labels)):
        canvas.label(figure, boxes[i][0], words)
        for j, image in enumerate(strip):
            canvas.put(figure, boxes[i][j], image, f"t = {int(ts[j])}" if i == 0 else "")
    x, y, w, h = boxes[-1][0]
    axes = figure.add_axes((x, y, boxes[-1][-1][0] + w - x, h * 0.94))
    axes.set(xlim=(-0.5, n - 0.5), xticks=range(n), xticklabels=[int(t) for t in ts], xlabel="noise level t")
    return figure, axes
