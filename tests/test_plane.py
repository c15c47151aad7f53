"""The plane: its closed forms by other routes, its measures, and that the paper's functions are what moves it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dmd
import latent_reward
import score_estimator
from diffusion import sample_ode, times
from lab import mixture, plane, plane_student
from lab.mixture import SCHEDULE, Settings, latents, points, undistilled


def draw(n, seed):
    """n points of the mixture in each class: x (CLASSES, 2, n, 1) and c."""
    rng = torch.Generator().manual_seed(seed)
    modes = torch.multinomial(torch.tensor([mixture.WEIGHTS] * 3), n, replacement=True, generator=rng)  # (CLASSES, n)
    means = mixture.MEANS.gather(1, modes[..., None].expand(-1, -1, 2))
    return latents(means + mixture.STD * torch.randn(means.shape, generator=rng)), mixture.classes(3)


@pytest.mark.parametrize("t", [50, 300, 800])
def test_the_teachers_score_is_the_gradient_of_the_log_density(t):
    x, c = draw(20, 0)
    t = times(torch.tensor(float(t)), x)
    x_t = (x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    (expected,) = torch.autograd.grad(mixture.log_density(x_t, t, c).sum(), x_t)
    found = dmd.score(x_t, mixture.teacher(x_t, t, c), SCHEDULE.alpha(t), SCHEDULE.sigma(t))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_the_density_sums_to_one():
    side = torch.linspace(-5, 5, 300)
    grid = latents(torch.cartesian_prod(side, side)[None])
    p = mixture.log_density(grid, torch.tensor([200.0]), {"class": torch.tensor([1])}).exp()
    assert (p.sum() * (side[1] - side[0]) ** 2).item() == pytest.approx(1, abs=1e-3)


def test_the_teachers_reverse_steps_recover_the_mixture():
    """60 steps of Eq. 2 from pure noise: every mode has its share of the points, and its spread."""
    z = torch.randn(mixture.CLASSES, 2, 1000, 1, generator=torch.Generator().manual_seed(0))
    x = points(sample_ode(mixture.teacher, z, mixture.classes(mixture.CLASSES), 60)).flatten(0, 1)
    distance, mode = torch.cdist(x, mixture.MEANS.flatten(0, 1)).min(1)
    shares = torch.bincount(mode, minlength=9) / 1000
    torch.testing.assert_close(shares, torch.tensor(mixture.WEIGHTS * mixture.CLASSES), atol=0.06, rtol=0)
    assert (distance.square().mean() / 2).sqrt().item() == pytest.approx(mixture.STD, rel=0.1)


EXACT = undistilled((0,)).fake  # as the teacher


@pytest.mark.parametrize("t", plane_student.LEVELS[::4])
def test_the_exact_student_has_no_divergence(t):
    """KL and score error of the mixture's own samples are zero but for the errors that are told."""
    (found,) = plane_student.levels(EXACT, draw(300, 1)[0], draw(3000, 2)[0], (t,))
    assert abs(found["kl"][0]) < 4 * found["kl_error"][0] + 2 * abs(found["kl_bias"][0])
    assert found["score_error"][0] < 2 * found["score_noise"][0] + 1e-3


def test_the_divergence_of_a_shifted_student():
    """Every mode moved by d: far from other modes the KL of the noised student is α² d² / (2 v)."""
    shift = torch.tensor([0.12, -0.05]).view(1, 2, 1, 1)
    (found,) = plane_student.levels(EXACT, draw(1000, 1)[0] + shift, draw(6000, 2)[0] + shift, (100,))
    alpha, sigma = 0.9, 0.1
    expected = alpha**2 * shift.square().sum().item() / (2 * (alpha**2 * mixture.STD**2 + sigma**2))
    assert abs(found["kl"][0] - expected) < 4 * found["kl_error"][0] + 2 * abs(found["kl_bias"][0]) < expected / 2


def test_coverage_by_hand():
    """One of nine modes is left out; then a tenth of the points lies far away."""
    x = points(draw(1000, 0)[0])
    first = x[0]
    first[torch.cdist(first, mixture.MEANS[0]).argmin(1) == 2] = mixture.MEANS[0, 0]
    covered, strays = plane_student.coverage(latents(x))
    assert covered == pytest.approx(8 / 9) and strays < 0.003  # exp(-8) of a Gaussian's points lie beyond 4 STD
    x[:, :100] = 9.0
    assert plane_student.coverage(latents(x))[1] == pytest.approx(0.1, abs=0.003)


def test_the_reward_of_noisy_points_is_the_mean_reward_of_their_clean_ones():
    """By weighting clean points with the likelihood of one noisy point."""
    x = draw(20_000, 3)[0][1:2]
    c = {"class": torch.tensor([1])}
    s = torch.tensor([600.0])
    z = torch.tensor([0.3, -0.4]).view(1, 2, 1, 1)
    alpha, sigma = SCHEDULE.alpha(s), SCHEDULE.sigma(s)
    likely = (-(z - alpha * x).square().sum(1) / (2 * sigma.squeeze(3) ** 2)).flatten().softmax(0)
    expected = 4 * (likely * mixture.outward(x, c).flatten()).sum()
    assert mixture.R(z, s, c).item() == pytest.approx(expected.item(), abs=0.03)


# ------------------------------------------------------------------------------- the paper's functions


def kl(trainer):
    fresh, own = (plane_student.student(trainer.G, n, seed)[0] for n, seed in ((200, 1), (600, 2)))
    return plane_student.levels(trainer.fake, fresh, own, (100,))[0]["kl"][0]


def test_distribution_matching_moves_the_student_to_the_teacher_and_its_opposite_away(monkeypatch):
    """Eq. 4 is dmd.gradient's: with its sign turned the same run leads away."""
    start = undistilled((0,))
    short = Settings(updates=80, ema=1.0)
    before = kl(start)
    assert kl(mixture.train(start, short, 0)) < 0.95 * before
    real = dmd.gradient
    monkeypatch.setattr(dmd, "gradient", lambda *inputs: -real(*inputs))
    assert kl(mixture.train(start, short, 0)) > 2 * before


STAGE1 = Settings(updates=4)
STAGE2 = Settings(updates=5, stage=2)
USED = [
    (dmd, "loss", STAGE1, lambda f: lambda x, g: f(x, 2 * g) + x.sum()),
    (dmd, "student_step", STAGE1, lambda f: lambda *a: 3 - f(*a)),
    (dmd, "renoise_time", STAGE1, lambda f: lambda *a: f(*a) / 2),
    (score_estimator, "draw", STAGE1, lambda f: lambda *a: (f(*a)[0] / 2, f(*a)[1])),
    (score_estimator, "loss", STAGE1, lambda f: lambda *a: -f(*a)),
    (score_estimator, "pull", STAGE1, lambda f: lambda *a: None),
    (mixture, "backward_simulation", STAGE1, lambda f: lambda *a: f(*a) + 1),
    (latent_reward, "rollout", STAGE2, lambda f: lambda *a: f(*a)[:1]),
    (latent_reward, "choose", STAGE2, lambda f: lambda *a: (f(*a)[1], f(*a)[0], f(*a)[2])),
    (latent_reward, "pair_terms", STAGE2, lambda f: lambda *a: (-f(*a)[0], f(*a)[1])),
    (latent_reward, "loss", STAGE2, lambda f: lambda *a: -f(*a)),
]


@pytest.mark.parametrize("module, function, settings, change", USED, ids=[f"{m.__name__}.{f}" for m, f, *_ in USED])
def test_the_papers_functions_are_what_moves_it(module, function, settings, change, monkeypatch):
    """Any of them changed, the run's weights are others; unchanged, they are the same."""

    def weights():
        trainer = mixture.train(undistilled((0,)), settings, 0)
        return torch.cat([p.detach().flatten() for net in (trainer.G, trainer.fake) for p in net.parameters()])

    before = weights()
    assert torch.equal(weights(), before)
    monkeypatch.setattr(module, function, change(getattr(module, function)))
    assert not torch.equal(weights(), before)


def test_runs_of_a_stack_do_not_know_of_each_other():
    """A run's gradient is its own: another run beside it with other weights and noise changes nothing in it."""
    both, alone = mixture.Student([0, 1]), mixture.Student([1])
    for two, one in zip(both.parameters(), alone.parameters()):  # the last layer is zero, and hides the others
        two.data += 0.1 * torch.randn(two.shape, generator=torch.Generator().manual_seed(7))
        one.data = two.data[1:].clone()
    rng = torch.Generator().manual_seed(5)
    x, eps = (torch.randn(12, 2, 8, 1, generator=rng) for _ in range(2))
    t = SCHEDULE.t_at(torch.rand(12, generator=rng))
    score_estimator.loss(both, x, t, eps, mixture.classes(6, 2)).backward()
    half = slice(6, None)
    score_estimator.loss(alone, x[half], t[half], eps[half], mixture.classes(6)).backward()
    for two, one in zip(both.parameters(), alone.parameters()):
        torch.testing.assert_close(2 * two.grad[1], one.grad[0], atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------ the verdicts


def test_paired_differences_decide():
    """Ten seeds whose sides differ by 1 +- 0.5 although each varies by much more; nine decide nothing."""
    worse = [10.0 * i for i in range(10)]
    better = [w - 1 + 0.5 * (-1) ** i for i, w in enumerate(worse)]
    gain, error, decided = plane.verdict(better, worse, -1)
    assert (gain, decided) == (pytest.approx(1), "holds") and error == pytest.approx(0.5 * (10 / 9) ** 0.5 / 10**0.5)
    assert plane.verdict(better, worse, 1)[2] == "does not hold"
    assert plane.verdict([1.0, -1.0] * 5, [0.0] * 10, 1)[2] == "within noise"
    assert plane.verdict(better[:9], worse[:9], -1) == (None, None, "9 seeds, not decided")


def test_every_claim_names_runs():
    for _, better, worse, *_ in plane.CLAIMS:
        assert {better, worse} <= plane.RUNS.keys()
    assert plane.RUNS[plane.STANDARD] == plane.BASE


def test_the_command_trains_what_is_missing_and_writes_the_page(tmp_path, monkeypatch):
    """Two seeds, six updates: every run, claim and level is on the page; a second call trains nothing."""
    short = {title: replace(settings, updates=6, ttur=1) for title, settings in plane.RUNS.items()}
    short = {title: replace(settings, lr=1e-3 + 1e-6 * i) for i, (title, settings) in enumerate(short.items())}
    monkeypatch.setattr(plane, "RUNS", short)
    monkeypatch.setattr(plane, "BASE", replace(plane.BASE, updates=6))
    monkeypatch.setattr(plane, "CENTRES", 200)
    monkeypatch.setattr("sys.argv", ["lab.plane", "--jobs", "1", "--seeds", "100", "101", "--out", str(tmp_path)])
    plane.main()
    text = (tmp_path / "plane.md").read_text()
    for title in (plane.START, *short, *(claim[0] for claim in plane.CLAIMS), *map(str, plane_student.LEVELS)):
        assert f"\n| {title} |" in text
    assert text.count("2 seeds, not decided") == len(plane.CLAIMS)
    monkeypatch.setattr(plane, "measure", None)
    plane.main()
    assert (tmp_path / "plane.md").read_text() == text


def test_the_page_is_that_of_the_kept_runs(monkeypatch):
    monkeypatch.setattr(plane, "measure", None)  # nothing is trained
    groups = [tuple(range(i, i + plane.GROUP)) for i in range(0, 20, plane.GROUP)]
    assert plane.page(plane.run(groups, 1, Path("results/plane.json"))) == Path("results/plane.md").read_text()
