"""Flash-DMD in the plane: data whose true score is known in closed form, and the paper's own functions on it.

A latent (B, 2, n, 1) is a cloud of n points that share a class, which is their prompt, and a noise level. The teacher
is the exact denoiser of a Gaussian mixture; the reward is closed form too. G and the score estimator are small MLPs.
Runs that differ in their seed alone are trained at once: their MLPs are a stack, their latents lie one run after
another in B. Left out: Pixel-GAN, which needs pixels; so a student step without a DM loss has no loss at all.
"""

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import one_hot, silu

import dmd
import latent_reward
import score_estimator
from diffusion import Schedule, backward_simulation, times

CLASSES, ARM = 3, 3  # each class is an arm of a spiral, of three modes
WEIGHTS = (0.5, 0.3, 0.2)  # of an arm's modes, from the inside
STD = 0.17  # of each mode
SCHEDULE = Schedule("flow")  # σ_t is t/1000
STEPS = SCHEDULE.steps(4)  # 1000, 750, 500, 250
CLOUDS, POINTS = 24, 16  # latents of a run in one loop, points of a latent
PAIRS = 48  # latents of a run in a preference update, of one point each


def means():
    """The modes' means, (CLASSES, ARM, 2): an arm's modes lie outwards and turn."""
    k = torch.arange(ARM)
    angle = torch.arange(CLASSES)[:, None] * 2 * math.pi / CLASSES + 0.5 * k
    return (0.5 + 0.75 * k)[:, None] * torch.stack([angle.cos(), angle.sin()], 2)


MEANS = means()
OUTER = MEANS[:, -1]  # (CLASSES, 2)
AHEAD = OUTER / OUTER.norm(dim=1, keepdim=True)


def points(x):
    """(B, 2, n, 1) -> (B, n, 2)."""
    return x.squeeze(3).transpose(1, 2)


def latents(p):
    """(B, n, 2) -> (B, 2, n, 1)."""
    return p.transpose(1, 2).unsqueeze(3)


def classes(n, runs=1):
    """The condition of n latents in each run: the classes in turn."""
    return {"class": (torch.arange(n) % CLASSES).repeat(runs)}


def joint_log_density(x_t, t, c):
    """log p_t(x_t, mode | class) of every point, (B, n, ARM). x_t (B, 2, n, 1) at t (B,)."""
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    variance = ((alpha * STD) ** 2 + sigma**2).squeeze(3)  # (B, 1, 1)
    apart = (points(x_t)[:, :, None] - alpha * MEANS[c["class"]][:, None]).square().sum(3)  # (B, n, ARM)
    return torch.tensor(WEIGHTS).log() - apart / (2 * variance) - torch.log(2 * math.pi * variance)


def log_density(x_t, t, c):
    """log p_t(x_t | class) of every point, (B, n)."""
    return joint_log_density(x_t, t, c).logsumexp(2)


def teacher(x_t, t, c):
    """The exact E[x_0 | x_t, class], a Denoiser: the mean over modes, as likely as x_t makes them."""
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    mean = latents(joint_log_density(x_t, t, c).softmax(2) @ MEANS[c["class"]])
    return mean + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (x_t - alpha * mean)


teacher.schedule = SCHEDULE


def outward(x_0, c):
    """The reward that preference updates see: how far clean points lie towards the last mode of their class, (B, n)."""
    return (points(x_0) * AHEAD[c["class"]][:, None]).sum(2)


def R(z_s, s, c):
    """That reward of noisy latents, E[outward(x_0) | z_s] over the mixture, (B,). Scaled for `choose`."""
    return 4 * outward(teacher(z_s, s, c), c).mean(1)


def arrived(x_0, c):
    """The second reward, which no update sees: whether points lie IN that last mode, softly, in (0, 1]. (B, n)."""
    apart = (points(x_0) - OUTER[c["class"]][:, None]).square().sum(2)
    return torch.exp(-apart / (2 * (2 * STD) ** 2))


# ----------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Settings:
    """Of one run; names and meanings are those of train.py's flags."""

    updates: int = 420  # generator updates: by distillation in stage 1, by preference in stage 2
    ttur: int = 1
    ema: float = 0.99
    lr: float = 1e-3
    fake_lr: float = 5e-3
    dm_steps: str = "all"
    renoise: tuple = (0.02, 0.98)
    stage: int = 1
    rl_ratio: int = 5  # stage 2: preference updates per distillation loop; 0 = no distillation
    rl_lr: float = 2e-4
    beta: float = 0.5
    pair_threshold: float = 0.2


class Student(nn.Module):
    """G, or the score estimator, of every run, as a Denoiser: a stack of MLPs that correct the teacher's v.

    As in the paper both begin as the teacher: the last layer is zero.
    """

    schedule = SCHEDULE

    def __init__(self, seeds, width=64):
        super().__init__()
        self.runs = len(seeds)
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = [torch.stack([torch.randn(n, width, generator=rng) for rng in rngs]) for n in (21, width, width)]
        weights = [w * (2 / w.shape[1]) ** 0.5 for w in drawn]
        self.weights = nn.ParameterList([*weights, torch.zeros(self.runs, width, 2)])
        self.biases = nn.ParameterList(torch.zeros(self.runs, 1, w.shape[2]) for w in self.weights)

    def forward(self, x_t, t, c):
        x = points(x_t)  # (B, n, 2)
        level = waves(t[:, None, None] / 1000, (2, 4, 8, 16))
        shared = torch.cat([*level, one_hot(c["class"], CLASSES)[:, None]], 2).expand(-1, x.shape[1], -1)
        h = torch.cat([x, *waves(x, (2, 4)), shared], 2).view(self.runs, -1, 21)
        for i, (w, b) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(b, silu(h) if i else h, w)
        return teacher(x_t, t, c) - self.schedule.sigma(t) * latents(h.view_as(x))


def waves(x, frequencies):
    angles = (x[..., None] * torch.tensor(frequencies)).flatten(2)
    return [angles.sin(), angles.cos()]


def update(optimizer, lr, loss):
    """Losses are means over all runs; AdamW does not mind the factor, and so no run knows of the others."""
    optimizer.param_groups[0]["lr"] = lr
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


class Trainer:
    """G and the score estimator with their optimizers, trained by the paper's functions."""

    def __init__(self, G, fake, settings, seed):
        self.G, self.fake = deepcopy(G), deepcopy(fake)
        self.ref = deepcopy(G).requires_grad_(False)
        self.settings = settings
        self.seed = seed
        self.rng = torch.Generator().manual_seed(seed)
        players = self.G, self.fake, self.G  # preference updates have an optimizer of their own, as in train.py
        self.opt_G, self.opt_fake, self.opt_RL = (torch.optim.AdamW(net.parameters(), fused=True) for net in players)
        self.left = 1.0  # of the run; rates fall to zero with it, as on the image toy

    def noise(self, *shape):
        return torch.randn(*shape, 1, generator=self.rng)

    def pull(self):
        score_estimator.pull(self.fake.parameters(), self.G.parameters(), self.settings.ema)  # Eq. 11

    def distil(self, loop, moves_G=True):
        """Algorithm 1, lines 5-8, 10, 13-14, 17-18 and 20-24."""
        G, fake, settings = self.G, self.fake, self.settings
        n = CLOUDS * G.runs
        c, rngs = classes(CLOUDS, G.runs), [self.rng] * n  # the concepts take a generator per sample
        i = dmd.student_step(STEPS, settings.dm_steps, self.seed, loop)
        x_tau = backward_simulation(G, self.noise(n, 2, POINTS), c, STEPS, rngs, 0, i)
        with torch.set_grad_enabled(moves_G):
            x = G(x_tau, times(STEPS[i], x_tau), c)
        if moves_G:
            t = dmd.renoise_time(SCHEDULE, settings.renoise, rngs)
            g = dmd.gradient(teacher, fake, x, t, self.noise(n, 2, POINTS), c)
            update(self.opt_G, self.left * settings.lr, dmd.loss(x, g))  # Eq. 4
            self.pull()
        x = x.detach()
        t, eps = score_estimator.draw(SCHEDULE, rngs, x)
        update(self.opt_fake, self.left * settings.fake_lr, score_estimator.loss(fake, x, t, eps, c))  # Eq. 6

    def prefer(self):
        """Lines 28-31, at the two noisiest steps."""
        G, settings, n = self.G, self.settings, PAIRS * self.G.runs
        c, rows, loss = classes(PAIRS, G.runs), torch.arange(n), 0.0
        z, rngs = self.noise(n, 2, 1), [self.rng] * n
        for i, z_t, z_s, scores in latent_reward.rollout(G, R, z, c, c, STEPS, 2, 4, "random", rngs):
            win, lose, kept = latent_reward.choose(scores, settings.pair_threshold)
            pair = z_t, z_s[rows, win], z_s[rows, lose]
            H, _ = latent_reward.pair_terms(G, self.ref, *pair, STEPS[i], STEPS[i + 1], c)  # Eq. 13
            loss = loss + (latent_reward.loss(H, settings.beta) * kept).mean()  # Eq. 12
        update(self.opt_RL, self.left * settings.rl_lr, loss)
        self.pull()


def train(start, settings, seed, see=lambda trainer, done: None):
    """Stage 1 or 2 from the networks of a Trainer -> a Trainer.

    see(trainer, done): called before the first update of G, and after each with its number.
    """
    trainer = Trainer(start.G, start.fake, settings, seed)
    see(trainer, 0)
    for done in range(1, settings.updates + 1):
        trainer.left = 1 - (done - 1) / settings.updates
        if settings.stage == 1:
            for loop in range((done - 1) * settings.ttur + 1, done * settings.ttur + 1):
                trainer.distil(loop, loop % settings.ttur == 0)  # line 12
        else:
            trainer.prefer()
            if settings.rl_ratio and done % settings.rl_ratio == 0:
                trainer.distil(done)
        see(trainer, done)
    return trainer


def undistilled(seeds, settings=Settings()):
    """Both networks as the teacher: the student is the teacher in four steps."""
    G = Student(seeds)
    return Trainer(G, G, settings, 0)
