"""Flash-DMD in the plane: data whose true score is known in closed form, and the paper's own functions on it.

A point is a latent of two channels, (B, 2, 1, 1); its class is its prompt. The teacher is the exact denoiser of a
Gaussian mixture, the reward is closed form too. G and the score estimator are small MLPs. Many runs that differ in
their seed alone are played at once: their networks are a stack, and their points stand one run after another in B.
Left out: Pixel-GAN, which needs pixels. So a student step that the DM loss does not train has no loss at all.
"""

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

import dmd
import latent_reward
import score_estimator
from diffusion import Schedule, backward_simulation, guided, times

CLASSES, ARM = 3, 3  # each class is an arm of a spiral, of three modes
WEIGHTS = (0.5, 0.3, 0.2)  # of an arm's modes, from the inside
STD = 0.17  # of each mode
SCHEDULE = Schedule("flow")  # the student's steps are t = 1000, 750, 500 and 250; σ_t is t/1000
STEPS = SCHEDULE.steps(4)
BATCH = 48  # points of one run


# ---------------------------------------------------------------------------------------------- the world


def arms():
    """The modes' means, (CLASSES * ARM, 2): an arm's modes lie outwards and turn."""
    k = torch.arange(ARM).repeat(CLASSES)
    angle = torch.arange(CLASSES).repeat_interleave(ARM) * 2 * math.pi / CLASSES + 0.5 * k
    return (0.5 + 0.75 * k)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


MEANS = arms()
OUTER = MEANS[ARM - 1 :: ARM]  # (CLASSES, 2): the outermost mode of each class
NULL = {"class": torch.tensor([CLASSES])}  # the null prompt: every class, equally often


def log_weights():
    """(CLASSES + 1, modes): the weight of every mode in every class, and in the null prompt's mixture."""
    own = torch.zeros(CLASSES + 1, CLASSES * ARM)
    for i in range(CLASSES):
        own[i, i * ARM : (i + 1) * ARM] = torch.tensor(WEIGHTS)
    own[CLASSES] = own[:CLASSES].mean(0)
    return own.log()


LOG_WEIGHTS = log_weights()


def joint_log_density(x_t, t, c):
    """log p_t(x_t, mode | class), (B, modes). x_t (B, 2, 1, 1) at t (B,)."""
    alpha, sigma = SCHEDULE.alpha(t).flatten(1), SCHEDULE.sigma(t).flatten(1)  # (B, 1)
    variance = (alpha * STD) ** 2 + sigma**2
    apart = (x_t.view(-1, 1, 2) - alpha[..., None] * MEANS).square().sum(-1)  # (B, modes)
    return LOG_WEIGHTS[c["class"]] - apart / (2 * variance) - torch.log(2 * math.pi * variance)


def log_density(x_t, t, c):
    """log p_t(x_t | class), (B,)."""
    return joint_log_density(x_t, t, c).logsumexp(1)


def teacher(x_t, t, c):
    """The exact E[x_0 | x_t, class], a Denoiser: the mean over modes, as likely as x_t makes them."""
    alpha, sigma = SCHEDULE.alpha(t).flatten(1), SCHEDULE.sigma(t).flatten(1)
    likely = joint_log_density(x_t, t, c).softmax(1)  # (B, modes)
    shrink = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
    mean = likely @ MEANS
    return (mean + shrink * (x_t.flatten(1) - alpha * mean)).view_as(x_t)


teacher.schedule = SCHEDULE


def draw(n, rng):
    """n points of the mixture, (n, 2, 1, 1), and their classes."""
    c = classes(n)
    modes = torch.multinomial(LOG_WEIGHTS[c["class"]].exp(), 1, generator=rng).flatten()
    x = MEANS[modes] + STD * torch.randn(n, 2, generator=rng)
    return x.view(n, 2, 1, 1), c


def classes(n, runs=1):
    """The condition of n points in each run: the classes in turn."""
    return {"class": (torch.arange(n) % CLASSES).repeat(runs)}


def outward(x_0, c):
    """The reward that preference updates follow, of clean points: how far they lie towards their last mode, (B,)."""
    u = OUTER / OUTER.norm(dim=1, keepdim=True)
    return (x_0.flatten(1) * u[c["class"]]).sum(1)


def R(z_s, s, c):
    """That reward of noisy points in closed form: E[outward(x_0) | z_s] over the mixture, (B,). Scaled for `choose`."""
    return 4 * outward(teacher(z_s, s, c), c)


def arrived(x_0, c):
    """The second reward, which no update sees: whether a point lies in that last mode, softly, in (0, 1]. (B,)."""
    return torch.exp(-(x_0.flatten(1) - OUTER[c["class"]]).square().sum(1) / (2 * (2 * STD) ** 2))


# ----------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Settings:
    """Of one run; names and meanings are those of train.py's flags."""

    updates: int = 300  # generator updates by distillation; 0 in stage 2
    ttur: int = 1
    ema: float = 0.9
    lr: float = 1e-3
    fake_lr: float = 3e-3
    dm_steps: str = "all"
    renoise: tuple = (0.02, 0.98)
    guidance: float = 1.0
    rl_updates: int = 0  # stage 2: preference updates
    rl_ratio: int = 5
    rl_only: bool = False
    rl_lr: float = 2e-4
    beta: float = 0.5
    pair_threshold: float = 0.2
    candidates: int = 4


class Player(nn.Module):
    """G, or the score estimator, in every run, as a Denoiser: a stack of MLPs that correct the teacher's v.

    As in the paper both begin as the teacher: the last layer is zero.
    """

    schedule = SCHEDULE

    def __init__(self, seeds, width=64):
        super().__init__()
        sizes = [2 + 8 + 8 + CLASSES, width, width, width]
        self.runs = len(seeds)
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.weights = nn.ParameterList()
        for rows, columns in zip(sizes, sizes[1:]):
            drawn = torch.stack([torch.randn(rows, columns, generator=rng) for rng in rngs])
            self.weights.append(drawn * (2 / rows) ** 0.5)
        self.weights.append(torch.zeros(self.runs, width, 2))
        self.biases = nn.ParameterList(torch.zeros(self.runs, 1, w.shape[2]) for w in self.weights)

    def forward(self, x_t, t, c):
        x, s = x_t.flatten(1), t[:, None] / 1000
        seen = [x, *waves(x, (2, 4)), *waves(s, (2, 4, 8, 16)), nn.functional.one_hot(c["class"], CLASSES).float()]
        h = torch.cat(seen, 1).view(self.runs, len(x) // self.runs, -1)
        for i, (w, b) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(b, nn.functional.silu(h) if i else h, w)
        return teacher(x_t, t, c) - self.schedule.sigma(t) * h.view_as(x_t)


def waves(x, frequencies):
    return [wave(k * x) for k in frequencies for wave in (torch.sin, torch.cos)]


def optimizer(net, lr):
    return torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01, fused=True)


def step(moves, loss):
    """One update. Losses are means over all runs; AdamW does not mind the factor, and so no run knows of the others."""
    loss.backward()
    moves.step()
    moves.zero_grad()


class Game:
    """G and the score estimator with their optimizers, in the hands of the paper's functions."""

    def __init__(self, G, fake, settings, seed):
        self.G = deepcopy(G)
        self.fake = deepcopy(fake)
        self.settings = settings
        self.seed = seed
        self.real = guided(teacher, NULL, settings.guidance)
        self.move_G = optimizer(self.G, settings.lr)
        self.move_fake = optimizer(self.fake, settings.fake_lr)
        self.move_RL = optimizer(self.G, settings.rl_lr)
        self.c = classes(BATCH, G.runs)
        # the concepts draw from one generator per sample; here it is one for all of them
        self.rng = [torch.Generator().manual_seed(seed)] * BATCH * G.runs

    def noise(self):
        return torch.randn(len(self.rng), 2, 1, 1, generator=self.rng[0])

    def pace(self, part):
        """Linear rates, as on the image toy: what is left of the run is `part`."""
        for moves, lr in ((self.move_G, "lr"), (self.move_fake, "fake_lr"), (self.move_RL, "rl_lr")):
            moves.param_groups[0]["lr"] = part * getattr(self.settings, lr)

    def pull(self):
        score_estimator.pull(self.fake.parameters(), self.G.parameters(), self.settings.ema)  # Eq. 11

    def distil(self, loop, moves_G=True):
        """Algorithm 1, lines 5-8, 10, 13-14, 17-18 and 20-24."""
        G, fake, rng, c = self.G, self.fake, self.rng, self.c
        i = dmd.student_step(STEPS, self.settings.dm_steps, self.seed, loop)
        x_tau = backward_simulation(G, self.noise(), c, STEPS, rng, 0, i)
        with torch.set_grad_enabled(moves_G):
            x = G(x_tau, times(STEPS[i], x_tau), c)
        if moves_G:
            t = dmd.renoise_time(SCHEDULE, self.settings.renoise, rng)
            step(self.move_G, dmd.loss(x, dmd.gradient(self.real, fake, x, t, self.noise(), c)))  # Eq. 4
            self.pull()
        x = x.detach()
        t, eps = score_estimator.draw(SCHEDULE, rng, x)
        step(self.move_fake, score_estimator.loss(fake, x, t, eps, c))  # Eq. 6

    def prefer(self, ref):
        """Lines 28-31, at the two noisiest steps."""
        settings, c = self.settings, self.c
        k = settings.candidates
        rollout = latent_reward.rollout(self.G, R, self.noise(), c, c, STEPS, 2, k, "random", self.rng)
        rows = torch.arange(len(self.rng))
        loss = 0.0
        for i, z_t, z_s, scores in rollout:
            win, lose, kept = latent_reward.choose(scores, settings.pair_threshold)
            pair = z_t, z_s[rows, win], z_s[rows, lose]
            H, _ = latent_reward.pair_terms(self.G, ref, *pair, STEPS[i], STEPS[i + 1], c)  # Eq. 13
            loss = loss + (latent_reward.loss(H, settings.beta) * kept).mean()  # Eq. 12
        step(self.move_RL, loss)
        self.pull()


def play(start, settings, seed, see=lambda game, update: None):
    """Stage 1 from a Player or, where there are preference updates, stage 2 from a finished Game -> the Game.

    see(game, update): called before the first update of G, and after each with its number.
    """
    G, fake = (start.G, start.fake) if isinstance(start, Game) else (start, start)
    game = Game(G, fake, settings, seed)
    see(game, 0)
    ref = deepcopy(game.G).requires_grad_(False)
    updates = settings.rl_updates or settings.updates
    for update in range(1, updates + 1):
        game.pace(1 - (update - 1) / updates)
        if settings.rl_updates:
            game.prefer(ref)
            if not settings.rl_only and update % settings.rl_ratio == 0:
                game.distil(update)
        else:
            for loop in range((update - 1) * settings.ttur + 1, update * settings.ttur + 1):
                game.distil(loop, loop % settings.ttur == 0)  # line 12
        see(game, update)
    return game
