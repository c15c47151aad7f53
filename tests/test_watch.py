"""--watch: scores of a file of prompts at previews."""

import pytest
import torch

from diffusion import guided
from engine import metrics, run_folder, watch
from engine.config import Config
from engine.errors import UserError
from engine.networks import assemble
from engine.pictures import generate
from engine.reward_model import load_reward_model

SMALL = {"batch_size": 1, "gan_weight": 0, "student_steps": 4}


def test_watch(small_toys, tmp_path):
    """The scores are those of G's pictures, four per prompt; the teacher's diversity at the same noise is beside."""
    model, prompts = small_toys["sdxl"], ["a small red circle on a white background", "a blue square"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    config = Config(**SMALL, watch=str(tmp_path / "prompts.txt"), reward="toy/lrm", model=model, preview_every=1)
    nets = assemble(config, 1, torch.device("cpu"))
    four_each = [prompt for prompt in prompts for _ in range(4)]
    seen = watch.Watch(nets).look(nets.G)
    images = generate(nets.G, nets.encoder, nets.vae, four_each, 4, seed=0)
    clip = metrics.Clip("toy/clip")
    f = torch.nn.functional.normalize(clip.features(images), dim=-1)
    assert seen["watch_clip_score"] == pytest.approx(clip.score(f, four_each).mean().item(), abs=1e-4)
    cosines = [(f[g + i] @ f[g + j]).item() for g in (0, 4) for i in range(4) for j in range(i)]
    assert seen["watch_diversity"] == pytest.approx(1 - sum(cosines) / 12, abs=1e-4)
    R = load_reward_model("toy/lrm", 64, model)
    reward = R.score_finished(nets.vae.encode(images), four_each).mean().item()
    assert seen["watch_reward"] == pytest.approx(reward, abs=1e-3)
    teacher = guided(nets.teacher, nets.null, config.teacher_guidance)
    images = generate(teacher, nets.encoder, nets.vae, four_each, 50, seed=0, ode=True)
    theirs = metrics.cosine_diversity(clip.features(images), 4).mean().item()
    assert seen["watch_diversity_teacher"] == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("settings", [{"preview_every": 0}, {"stage": "reward", "pairs": "pairs"}])
def test_watch_needs_previews(settings, tmp_path):
    with pytest.raises(UserError, match="--watch needs previews"):
        run_folder.look(Config(**SMALL | {"watch": "prompts.txt"} | settings))
    with pytest.raises(UserError, match="--watch .*none.txt: no such file"):
        run_folder.look(Config(**SMALL, watch=str(tmp_path / "none.txt")))
