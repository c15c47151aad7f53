"""Eq. 12 and 13 against densities, differences and a gradient by hand; the reward model's geometry and layout."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import latent_reward
import train
from diffusion import Schedule, randn, sample_generators
from engine import pictures, run_folder
from engine.batch import Batch
from engine.config import Config
from engine.errors import UserError
from engine.models import load_denoiser
from engine.networks import assemble
from engine.prompts import PromptEncoder
from engine.real_size import SDXL
from engine.reward_model import backbone, load_reward_model, save_reward_model
from engine.reward_training import Pairs, train_reward
from latent_reward import LatentRewardModel
from toy import world

S = Schedule().steps(4)
SHAPE = (5, 4, 8, 8)


def draw(n, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


def log_density(z, x_0, alpha, sigma):
    """log p(z_s|z_t), (B,), by torch.distributions."""
    return torch.distributions.Normal(alpha * x_0, sigma).log_prob(z).flatten(1).sum(1)


def test_eq_13_is_the_difference_of_four_log_densities():
    """H by the shortcut against torch.distributions' normal log densities of both candidates under both policies."""
    z_win, z_lose, theta, ref = draw(4)
    alpha, sigma = (torch.full((5, 1, 1, 1), v, dtype=torch.float64) for v in (0.6, 0.8))
    win, lose = (log_density(z, theta, alpha, sigma) - log_density(z, ref, alpha, sigma) for z in (z_win, z_lose))
    torch.testing.assert_close(latent_reward.log_ratio_margin(z_win, z_lose, theta, ref, alpha, sigma), win - lose)


def test_eq_12_gradient():
    """Against central differences in x0_theta, and by hand on a scalar policy z_s ~ N(α θ, σ²).

    There dL/dθ = -β σ(-βH) (z^w - z^l) α/σ², with H = (z^w - z^l) α (θ - θ_ref)/σ².
    """
    z_win, z_lose, theta, ref = draw(4, seed=1)
    alpha, sigma, beta = torch.full((5, 1, 1, 1), 0.6), torch.full((5, 1, 1, 1), 0.8), 0.02

    def value(x):
        return latent_reward.loss(latent_reward.log_ratio_margin(z_win, z_lose, x, ref, alpha, sigma), beta).sum()

    theta.requires_grad_(True)
    (found,) = torch.autograd.grad(value(theta), theta)
    for index in [(0, 0, 0, 0), (2, 1, 3, 4), (4, 3, 7, 7)]:
        step = torch.zeros(SHAPE, dtype=torch.float64)
        step[index] = 1e-4
        assert found[index].item() == pytest.approx(
            ((value(theta + step) - value(theta - step)) / 2e-4).item(), rel=1e-5
        )

    def scalar(v):
        return torch.as_tensor(v, dtype=torch.float64).view(1, 1, 1, 1)

    policy, w, low, a, s, b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), 1.7, -0.4, 0.6, 0.8, 0.5
    H = latent_reward.log_ratio_margin(*map(scalar, (w, low, policy, 0.1, a, s)))
    latent_reward.loss(H, b).sum().backward()
    H_by_hand = (w - low) * a * (0.3 - 0.1) / s**2
    by_hand = -b / (1 + math.exp(b * H_by_hand)) * (w - low) * a / s**2
    assert policy.grad.item() == pytest.approx(by_hand, rel=1e-9)


def test_at_the_reference_the_loss_is_log_2_and_a_step_parts_the_pair():
    z_win, z_lose, ref = draw(3, seed=2)
    theta = ref.clone().requires_grad_(True)
    alpha, sigma = torch.full((5, 1, 1, 1), 0.6), torch.full((5, 1, 1, 1), 0.8)
    H = latent_reward.log_ratio_margin(z_win, z_lose, theta, ref, alpha, sigma)
    assert H.abs().max() == 0
    loss = latent_reward.loss(H, 0.02)
    torch.testing.assert_close(loss, torch.full((5,), math.log(2), dtype=torch.float64))
    (slope,) = torch.autograd.grad(loss.mean(), theta)

    def margin(x):
        return log_density(z_win, x, alpha, sigma) - log_density(z_lose, x, alpha, sigma)

    assert (margin(theta - 0.1 * slope) > margin(theta)).all()


def test_agreement_is_more_than_rounding():
    H = torch.tensor([0.0, 1e-6, -1e-6, 0.01, -0.01])
    assert latent_reward.agrees(H).tolist() == [False, False, False, True, False]


def test_ratio_clip_stops_a_pair_whose_ratios_are_past_it():
    """Against the mean densities of torch.distributions: within 1 ± clip H is Eq. 13's; past it θ stands still."""
    z_win, z_lose, ref = draw(3, seed=5)
    alpha, sigma = torch.full((5, 1, 1, 1), 0.6), torch.full((5, 1, 1, 1), 0.8)
    near, far = ref + 1e-4 * (z_win - z_lose), (ref + (z_win - z_lose)).requires_grad_(True)
    arguments = (z_win, z_lose, near, ref, alpha, sigma)
    unclipped = latent_reward.log_ratio_margin(*arguments)
    torch.testing.assert_close(latent_reward.log_ratio_margin(*arguments, clip=0.1), unclipped)
    H = latent_reward.log_ratio_margin(z_win, z_lose, far, ref, alpha, sigma, clip=0.1)
    n = z_win[0].numel()
    win, lose = (log_density(z, far, alpha, sigma) - log_density(z, ref, alpha, sigma) for z in (z_win, z_lose))
    bounded_win, bounded_lose = ((ratio / n).exp().clamp(0.9, 1.1).log() * n for ratio in (win, lose))
    torch.testing.assert_close(H, bounded_win - bounded_lose)
    both_past = (win / n > math.log(1.1)) & (lose / n < math.log(0.9))
    (slope,) = torch.autograd.grad(H.sum(), far)
    assert both_past.any() and slope[both_past].abs().max() == 0


def test_choose_drops_ties():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, -1.0, 2.0], [0.2, 0.0, 0.9, 0.1]])
    win, lose, kept = latent_reward.choose(scores, 0.45)
    assert kept.tolist() == [False, True, False]  # gaps 0, 4, 0.9; 0.45 asks for 0.97
    assert (win[1], lose[1]) == (1, 2)
    assert latent_reward.choose(scores, 0.4)[2].tolist() == [False, True, True]  # and 0.4 for 0.85


@pytest.mark.parametrize("carry", ["random", "best"])
def test_candidates_share_their_start_and_differ_in_noise(carry):
    """Against G written by hand: z_s - α G(z_t) is fresh noise times σ; the chain goes on from a candidate."""
    schedule, seen = Schedule(), []

    def G(x_t, t, c):
        return 0.3 * x_t + 0.1

    def R(z_s, s, c):
        seen.append((z_s, s))
        return z_s.mean((1, 2, 3)) * 50

    G.schedule = schedule
    generators = sample_generators(0, 1, range(5), "rl")
    z, c = randn(generators, torch.empty(SHAPE)), {"pooled": torch.zeros(5, 2)}
    pool = latent_reward.rollout(G, R, z, c, c, S, 2, 4, carry, generators)
    assert [i for i, *_ in pool] == [0, 1] and pool[0][1] is z
    noises = []
    for (i, z_t, z_s, scores), (judged, s) in zip(pool, seen):
        assert set(s.tolist()) == {int(S[i + 1])}  # R looks at the candidates' own level
        assert torch.equal(judged.unflatten(0, (5, 4)), z_s) and scores.shape == (5, 4)
        level = S[i + 1].expand(5)
        noise = (z_s - (schedule.alpha(level) * G(z_t, None, None))[:, None]) / schedule.sigma(level)[:, None]
        assert noise.std() == pytest.approx(1, abs=0.05) and abs(noise.mean()) < 0.05
        noises.append(noise.flatten(2))
        assert (torch.cdist(noises[-1], noises[-1]) + 100 * torch.eye(4)).min() > 10  # four different ones
    z_1 = pool[1][1]
    same = (pool[0][2] == z_1[:, None]).all((2, 3, 4))
    assert (same.sum(1) == 1).all()
    best = pool[0][3].argmax(1)
    assert best.any()  # it is not the first candidate everywhere
    assert torch.equal(same.int().argmax(1), best if carry == "best" else torch.zeros_like(best))


def test_joint_training_holds_where_rl_alone_drifts():
    """A policy z_s ~ N(α θ, σ²) with reward <v, z_s>.

    Near the reference Eq. 12's slope is β α/(2 σ) times the expected range of four standard normals, 2.0588.
    Alone it moves θ along v by `drift` per update, without end, 1.24 after 400.
    With a distillation pull of strength κ towards θ_ref beside each update θ stays within drift (1 - κ)/κ = 0.059.
    """
    alpha, sigma = torch.full((64, 1, 1, 1), 0.6), torch.full((64, 1, 1, 1), 0.8)
    v = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    ref, beta, lr, kappa = torch.zeros(1, 4, 2, 2), 0.002, 2.0, 0.05

    def distances(joint, updates=400):
        generator, theta, path = torch.Generator().manual_seed(4), ref.clone(), []
        for _ in range(updates):
            theta.requires_grad_(True)
            z_s = alpha[:, None] * theta.detach() + sigma[:, None] * torch.randn(64, 4, 4, 2, 2, generator=generator)
            win, lose, kept = latent_reward.choose((z_s * v).flatten(2).sum(2), 0.45)
            rows = torch.arange(64)
            H = latent_reward.log_ratio_margin(
                z_s[rows, win], z_s[rows, lose], theta.expand(64, -1, -1, -1), ref, alpha, sigma
            )
            (slope,) = torch.autograd.grad((latent_reward.loss(H, beta) * kept).sum() / kept.sum(), theta)
            theta = (theta - lr * slope).detach()
            if joint:
                theta = theta - kappa * (theta - ref)
            path.append(theta.norm().item())
        return path

    drift = lr * beta * 0.6 / (2 * 0.8) * 2.0588
    alone, together = distances(joint=False), distances(joint=True)
    for updates in (100, 200, 400):
        assert alone[updates - 1] == pytest.approx(updates * drift, rel=0.05)
    assert together[-1] == pytest.approx(0.059, rel=0.05) == drift * (1 - kappa) / kappa
    assert max(together) < 1.1 * 0.059


# ------------------------------------------------------------------------------------ the reward model


def test_full_size_geometry():
    """SDXL's own UNet, on the meta device: 3520 features are projected to 1280, from where LPO takes them."""
    with torch.device("meta"):
        R, whole = LatentRewardModel(UNet2DConditionModel(**SDXL), None, 1280), UNet2DConditionModel(**SDXL)
        c = {"tokens": torch.empty(2, 77, 2048), "pooled": torch.empty(2, 1280), "size": torch.empty(2, 6)}
        features = R.features(torch.empty(2, 4, 128, 128), torch.empty(2, dtype=torch.long), c)
    assert [tuple(f.shape) for f in features] == [(2, 320), (2, 640), (2, 1280), (2, 1280)]
    assert tuple(R.visual_projection.weight.shape) == (1280, 3520) and R.visual_projection.bias is None
    left_out = ("up_blocks.", "conv_norm_out.", "conv_out.")
    expected = {name: tuple(p.shape) for name, p in whole.named_parameters() if not name.startswith(left_out)}
    assert {name: tuple(p.shape) for name, p in R.unet.named_parameters()} == expected and len(expected) > 500


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A reward model in the published layout: the toy's whole UNet and text encoders, a random projection."""
    path = tmp_path_factory.mktemp("lrm")
    UNet2DConditionModel.from_pretrained("toy/sdxl/unet").save_pretrained(path / "unet")
    encoder = PromptEncoder("toy/sdxl", 64)
    for name, net in zip(("text_encoder", "text_encoder_2"), encoder.encoders):
        net.save_pretrained(path / name)
    weight = torch.randn(64, 32 + 64 + 96 + 96, generator=torch.Generator().manual_seed(0))
    torch.save({"visual_projection": {"weight": weight}, "logit_scale": 2.0}, path / "state_dict.pt")
    return path, weight


def test_published_layout(small):
    """A folder without tokenizers is read with the pipeline's. Hooks on a whole UNet give its features and scores."""
    path, weight = small
    R = load_reward_model(path, 64, tokenizers="toy/sdxl")
    assert torch.equal(R.visual_projection.weight, weight) and R.logit_scale == 2.0
    z_t, t = torch.randn(3, 4, 16, 16), torch.tensor([749, 499, 20])
    prompts = ["a red circle", "a ring", "a large blue cross"]
    c = R.encoder.encode(prompts)

    whole, seen = UNet2DConditionModel.from_pretrained(path / "unet").eval(), []
    for block in whole.down_blocks:
        last = block.attentions[-1] if getattr(block, "has_cross_attention", False) else block.resnets[-1]
        last.register_forward_hook(lambda _m, _i, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
    whole.mid_block.register_forward_hook(lambda _m, _i, out: seen.append(out))

    def features(c):
        seen.clear()
        with torch.no_grad():
            whole(z_t, t, c["tokens"], added_cond_kwargs={"text_embeds": c["pooled"], "time_ids": c["size"]})
        return [x.mean((2, 3)) for x in seen]

    expected, *_, mid_null = features(c), *features(R.encoder.encode([""] * 3))
    with torch.no_grad():
        for found, by_hook in zip(R.features(z_t, t, c), expected, strict=True):
            torch.testing.assert_close(found, by_hook)
        *down, mid = expected
        joined = torch.cat([*down, mid_null + 7.5 * (mid - mid_null)], 1) @ weight.T
        cosines = torch.nn.functional.cosine_similarity(joined, c["pooled"])
        scores = R.score(z_t, t, prompts)
        torch.testing.assert_close(scores, math.exp(2.0) * cosines)
        one_by_one = [R.score(z_t[i : i + 1], t[i : i + 1], prompts[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(torch.cat(one_by_one), scores)


def test_saved_layout_has_the_up_blocks_and_reads_back(small, tmp_path):
    R = load_reward_model(small[0], 64, tokenizers="toy/sdxl")
    with torch.no_grad():
        R.unet.conv_in.weight += 0.1  # of its own, unlike the pipeline's
    save_reward_model(R, tmp_path, "toy/sdxl")
    again = load_reward_model(tmp_path, 64, tokenizers="toy/sdxl")
    assert all(torch.equal(p, q) for p, q in zip(R.state_dict().values(), again.state_dict().values(), strict=True))
    whole = UNet2DConditionModel.from_pretrained("toy/sdxl/unet").state_dict()
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == whole.keys() and torch.equal(saved["conv_in.weight"], R.unet.conv_in.weight)
    assert all(torch.equal(saved[k], whole[k]) for k in whole if k.startswith("up_blocks."))


@pytest.fixture(scope="module")
def first(small_toys, tmp_path_factory):
    """A stage-1 run of one loop, without a GAN."""
    out = tmp_path_factory.mktemp("stage-1") / "run"
    return train.train(Config(iterations=1, model=small_toys["sdxl"], out=str(out), **FEW))


FEW = {"batch_size": 2, "preview_every": 0, "log_every": 1, "gan_weight": 0.0, "lr_schedule": "constant"}


def after(run):
    """The settings that a stage 2 has of its stage-1 run."""
    return {"stage": 2, "init": str(run), "model": json.loads((run / "config.json").read_text())["model"]}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def student(run):
    return load_file(run_folder.newest(run) / "unet" / "diffusion_pytorch_model.safetensors")


def networks(config):
    return assemble(run_folder.look(config), 1, torch.device("cpu"), train.prepare)


def batch(nets, loop):
    """The toy's pictures of a loop."""
    n = len(nets.latent)
    samples = list(range(n * loop - n, n * loop))
    scenes, prompts = zip(*map(world.scene, samples), strict=True)
    return Batch(
        torch.stack(list(map(world.render, scenes))), list(prompts), nets.encoder.encode(prompts), samples, loop
    )


def test_stage_2_moves_g_and_pulls_the_score_estimator(first, small):
    """After an update of either kind ψ = λ ψ + (1 - λ) θ; reference and R stay as they came, bit for bit."""
    config = Config(**after(first), reward=str(small[0]), pair_threshold=0.0, rl_lr=1e-4, fake_lr=1e-30, **FEW)
    nets = networks(config)
    data = batch(nets, loop=1)
    for update in (lambda: train.prefer(nets, data), lambda: train.flash(nets, data, 1)):
        G, fake = ({k: v.clone() for k, v in net.net.state_dict().items()} for net in (nets.G, nets.fake))
        update()
        theta, psi = nets.G.net.state_dict(), nets.fake.net.state_dict()
        assert any(not torch.equal(theta[k], G[k]) for k in G)
        for k in psi:
            torch.testing.assert_close(psi[k], Config.ema * fake[k] + (1 - Config.ema) * theta[k], atol=1e-7, rtol=1e-5)
    before = student(first)
    assert all(torch.equal(p, before[k]) for k, p in nets.ref.net.state_dict().items())
    R = load_reward_model(small[0], 64, tokenizers="toy/sdxl").state_dict()
    assert R and all(torch.equal(p, R[k]) for k, p in nets.R.state_dict().items())


def test_stage_2_alternates_and_resumes(first, small, tmp_path):
    """r preference updates to 1 distillation update, counted; a run in two parts ends as one without a break.

    The reward here is real but untrained.
    """
    settings = {**FEW, **after(first), "reward": str(small[0]), "rl_ratio": 2, "rl_lr": 1e-4}
    settings["pair_threshold"] = 0.0
    whole = train.train(Config(iterations=4, out=str(tmp_path / "whole"), **settings))
    lines = metrics(whole)
    assert [("rl_loss" in m, "dm_loss" in m) for m in lines] == [
        (True, False),
        (True, False),
        (False, True),
        (True, False),
    ]
    assert (lines[-1]["rl_updates"], lines[-1]["generator_updates"], lines[-1]["loops"]) == (3, 1, 4)
    assert lines[0]["rl_loss"] == pytest.approx(math.log(2), rel=1e-4) and lines[0]["kl_to_reference"] == 0  # G = ref
    assert lines[1]["kl_to_reference"] > 0 and lines[0]["kept_pairs"] == 1

    half = train.train(Config(iterations=2, out=str(tmp_path / "half"), **settings))
    train.train(Config(iterations=4, out=str(half), resume=True, **settings))
    end, again, start = student(whole), student(half), student(first)
    assert all(torch.equal(end[k], again[k]) for k in end)
    assert any(not torch.equal(end[k], start[k]) for k in start)


def test_both_kinds_of_update_are_logged(first, small, tmp_path):
    """At 1:1 every loop that --log-every 2 names is a distillation update: the next preference update is logged too."""
    settings = {**FEW, **after(first), "reward": str(small[0]), "rl_ratio": 1, "log_every": 2}
    run = train.train(Config(iterations=4, out=str(tmp_path / "run"), **settings))
    assert [(m["loops"], "rl_loss" in m) for m in metrics(run)] == [(2, False), (3, True), (4, False)]


def test_preference_in_micro_batches(first, small):
    """Four prompts at once, or one by one: the same losses, rewards, pairs and norms.

    Agreement is compared in the second update, where H is far from 0; in the first it is 0 for every pair.
    """
    settings = {**FEW, "batch_size": 4, **after(first), "reward": str(small[0]), "rl_lr": 1e-4}
    runs = []
    for size in (0, 1):
        nets = networks(Config(micro_batch=size, pair_threshold=0.04, **settings))
        runs.append([train.prefer(nets, batch(nets, loop)) for loop in (1, 2)])
    for a, b in zip(*runs, strict=True):
        assert 0 < a["kept_pairs"] < 1 and a["kept_pairs"] == b["kept_pairs"]
        for key in ("rl_loss", "reward", "reward_gap", "implicit_accuracy", "kl_to_reference", "rl_norm"):
            assert float(b[key]) == pytest.approx(float(a[key]), rel=0.05 if key == "rl_norm" else 1e-3, abs=1e-6), key
    assert runs[0][0]["implicit_accuracy"] == 0 < runs[0][1]["implicit_accuracy"]


@pytest.mark.parametrize("K, judged, thresholds, kept", [(2, 1, 0.0, 1), (3, 2, (0.0, 0.999), 0.5), (4, 2, 0.0, 1)])
def test_the_noisiest_steps_are_judged(K, judged, thresholds, kept, first, small, monkeypatch):
    """min(2, K - 1) of K steps, each pair by its own step's threshold; the last step has no density."""
    nets = networks(Config(**after(first), reward=str(small[0]), **FEW))
    nets.config.student_steps, nets.config.pair_threshold, nets.S = K, thresholds, nets.G.schedule.steps(K)
    seen = []
    pair_terms = latent_reward.pair_terms
    monkeypatch.setattr(latent_reward, "pair_terms", lambda *a: seen.append(a[5:7]) or pair_terms(*a))
    logged = train.prefer(nets, batch(nets, loop=1))
    assert seen == list(zip(nets.S, nets.S[1:]))[:judged] and logged["kept_pairs"] == kept


def test_a_reward_run_ends_on_sigterm(preferences, tmp_path, monkeypatch):
    """SIGTERM while its second loop loads: --stage reward saves after that loop and leaves."""
    load = Pairs.__getitem__

    def signalled(self, i):
        if i == 4:  # the second batch's first sample
            os.kill(os.getpid(), signal.SIGTERM)
        return load(self, i)

    monkeypatch.setattr(Pairs, "__getitem__", signalled)
    run = train_reward(
        Config(stage="reward", pairs=str(preferences), batch_size=4, preview_every=0, out=str(tmp_path / "run"))
    )
    assert [path.name for path in run_folder.checkpoints(run)] == ["checkpoint-000002"]


def test_the_scale_of_scores_stays_in_fp32(tmp_path):
    """CLIP's, exp 4.6052 = 100: rounded to bf16 it would be 101.1, and every gap of a pair 1.1 % off."""
    path = shutil.copytree("toy/lrm", tmp_path / "lrm")
    state = torch.load(path / "state_dict.pt", weights_only=True)
    torch.save(state | {"logit_scale": 4.6052}, path / "state_dict.pt")
    R = load_reward_model(path, 64, tokenizers="toy/sdxl", dtype=torch.bfloat16)
    assert R.logit_scale.exp().item() == pytest.approx(100, rel=1e-4)
    assert R.visual_projection.weight.dtype == R.unet.dtype == torch.bfloat16


def test_half_written_folder(small, tmp_path):
    with pytest.raises(UserError, match="state_dict.pt"):
        (tmp_path / "unet").mkdir()
        (tmp_path / "text_encoder").mkdir()
        (tmp_path / "text_encoder_2").mkdir()
        load_reward_model(tmp_path, 64)


def test_reward_model_of_another_width(first, small, tmp_path):
    """One for 16-channel latents is refused by name at the start of stage 2; another projection, when it is read."""
    other = tmp_path / "lrm"
    shutil.copytree(small[0], other)
    config = dict(UNet2DConditionModel.load_config(other / "unet")) | {"in_channels": 16}
    UNet2DConditionModel.from_config(config).save_pretrained(other / "unet")
    with pytest.raises(UserError, match="latents of 16 channels"):
        train.train(Config(**after(first), reward=str(other), out=str(tmp_path / "second"), **FEW))
    assert not (tmp_path / "second").exists()
    torch.save({"visual_projection": {"weight": torch.zeros(64, 7)}, "logit_scale": 2.0}, other / "state_dict.pt")
    with pytest.raises(UserError, match="state_dict.pt.*7"):
        load_reward_model(other, 64, "toy/sdxl")


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """300 pairs that a child could rank: a scene and a gray picture; in every third the scene is second."""
    folder, rows = tmp_path_factory.mktemp("pairs"), []
    for i in range(300):
        scene, _ = world.scene(i)
        names = [f"{i}-good.png", f"{i}-gray.png"]
        for name, image in zip(names, (world.render(scene), torch.zeros(3, 64, 64))):
            pictures.to_pil(image).save(folder / name)
        first, second = names if i % 3 else names[::-1]
        rows.append(
            {"caption": "a picture", "jpg_0_file_name": first, "jpg_1_file_name": second, "label_0": 1 if i % 3 else 0}
        )
    rows.append(rows[0] | {"label_0": 0.5})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.mark.parametrize("model, rate", [("toy/sdxl", 2e-4), ("toy/sd3", 1e-3)])
def test_stage_reward_learns_a_preference_and_resumes(model, rate, preferences, tmp_path):
    """R ranks held-out pairs right after 20 updates; a run in two parts ends with the same weights.

    Its first part recomputes activations.
    """
    settings = {"stage": "reward", "pairs": str(preferences), "batch_size": 4, "preview_every": 0}
    settings |= {"model": model, "reward_lr": rate}
    whole = train_reward(Config(**settings, iterations=20, out=str(tmp_path / "whole")))
    train_reward(Config(**settings, iterations=12, checkpointing=True, out=str(tmp_path / "halves")))
    halves = train_reward(Config(**settings, iterations=20, out=str(tmp_path / "halves"), resume=True))
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out_right_at_50"] >= 0.9 and last["loops"] == 20
    R, again = (load_reward_model(run_folder.newest(run) / "lrm", 64, model) for run in (whole, halves))
    assert all(torch.equal(a, b) for a, b in zip(R.parameters(), again.parameters()))
    weight = {"toy/sdxl": "conv_in.weight", "toy/sd3": "transformer_blocks.0.attn.to_q.weight"}[model]
    denoiser = load_denoiser(model).net
    assert not torch.equal(backbone(R).get_parameter(weight), denoiser.get_parameter(weight))


def test_pairs_put_the_better_first_and_leave_ties_out(preferences):
    pairs = Pairs(preferences, 64, 0)
    assert len(pairs.rows) + len(pairs.kept_out) == 300 and len(pairs.kept_out) == 15
    for i in range(len(pairs.rows)):
        better, worse = pairs[i][0]
        assert worse.abs().max() < 0.01 < better.abs().max()
