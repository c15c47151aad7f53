"""Flags and settings: presets, methods and their own flags, and run folders of before --method existed."""

import json
import math
import re
from dataclasses import asdict, fields

import pytest
import torch

import dmd
import train
from diffusion import Schedule, T
from engine import run_folder
from engine.config import METHODS, PRESETS, TIMESTEPS, Config
from engine.errors import UserError
from engine.run_folder import saved_settings
from siblings import advdmd, dmd2, dmdr, settings_of

PAPER = {  # the paper's tables: stage, batch, iterations, TTUR, student steps, whether LoRAs
    "sdxl-4step": (1, 64, 1000, 1, 4, False),
    "sdxl-4step-ttur2": (1, 64, 4000, 2, 4, False),
    "sdxl-4step-ttur5": (1, 64, 18000, 5, 4, False),
    "sdxl-8step": (1, 48, 3000, 2, 8, False),
    "sd3-4step": (1, 32, 4000, 2, 4, True),
    "sdxl-stage2": (2, 64, 5000, 1, 4, False),
    "sdxl-8step-stage2": (2, 48, 3000, 1, 8, False),
    "sdxl-dmd2": (1, 128, 24000, 5, 4, False),
}
OWN = {  # a sibling's own flags
    "flash": set(),
    "dmd2": {"critic_weight", "head", "d_block"},
    "advdmd": {"critic_weight", "head", "d_block", "rl_after", "rl_gate", "judge"},
    "dmdr": {
        *("fake_lora", "lora_layers", "dynamic", "real_scale", "dm_input"),
        *("rl", "reward_start", "reward_weight", "reward_margin"),
    },
}


@pytest.mark.parametrize("preset", PAPER)
def test_presets_are_the_papers(preset):
    c = train.read(["--preset", preset])
    c.check()
    assert (c.stage, c.batch_size, c.iterations, c.ttur, c.student_steps, bool(c.lora_rank)) == PAPER[preset]
    assert c.guidance == (7 if c.lora_rank else 8) and c.resolution == 1024  # Table 2's teacher; DMD2's w
    assert train.read(["--preset", preset, "--ttur", "3"]).ttur == 3
    assert getattr(c, "head", None) == ("published" if preset == "sdxl-dmd2" else None)


def test_presets_have_the_published_codes_values_where_the_paper_is_silent(monkeypatch):
    """LPO's of stage 2, DMD2's of its baseline; SDXL's DM loss draws t = 20 .. 980. The toy has none of them."""
    two, dmd2_ = (train.read(["--preset", preset]) for preset in ("sdxl-stage2", "sdxl-dmd2"))
    assert (two.pair_threshold, two.ratio_clip, two.judged()) == ((0.6, 0.573), 0.1, 2)
    assert two.beta == pytest.approx(500 / 65536, rel=0.01)
    assert (dmd2_.lr, dmd2_.fake_lr, dmd2_.clip_grad, dmd2_.warmup) == (5e-7, 5e-7, 10, 500)
    assert (dmd2_.guidance, dmd2_.gan_weight, dmd2_.critic_weight, dmd2_.batch_size) == (8, 5e-3, 1e-2, 128)
    ends = torch.tensor([0.0, 1 - 2**-24])  # of what torch.rand can draw
    monkeypatch.setattr(dmd, "rand", lambda generators, device: ends)
    for config, last in ((two, 980), (dmd2_, 980), (train.read([]), 979)):
        assert dmd.renoise_time(Schedule(), config.renoise, None).tolist() == [20, last]
    toy = train.read([])
    assert (toy.pair_threshold, toy.ratio_clip, toy.warmup, toy.clip_grad) == (0.45, 0, 0, 1)


def test_thresholds_are_one_number_or_one_for_each_step(tmp_path):
    """Read from a flag or from the config.json of a run that goes on; a row of results/ keeps its name."""
    flags = ["--stage", "2", "--pair-threshold"]
    assert train.read([*flags, "0.5"]).pair_threshold == 0.5 and train.read([*flags, "0.5"]).thresholds() == (0.5,)
    config = train.read([*flags, "0.5,0.4,0.3"])
    assert config.thresholds() == (0.5, 0.4, 0.3)
    run_folder.write_config(tmp_path, config)
    assert train.read(["--resume", "--out", str(tmp_path)]).thresholds() == (0.5, 0.4, 0.3)
    config.check()
    config.student_steps = 2
    with pytest.raises(UserError, match="^--pair-threshold has 3 numbers for 2 student steps: give one"):
        config.check()


@pytest.mark.parametrize("K", [1, 2, 3, 4, 8, TIMESTEPS])
def test_presets_take_any_number_of_steps(K):
    """Every preset of every method, but for what has no density at one step, with the flag that helps."""
    assert TIMESTEPS == T
    for preset in PRESETS:
        for method in METHODS:
            config = train.read(["--preset", preset, "--method", method, "--student-steps", str(K), "--dry-run"])
            if K > 1 or config.stage == 1 and (method != "advdmd" or not config.gan_weight):
                config.check()
            else:
                with pytest.raises(UserError, match="--student-steps of at least 2: the last step has no density"):
                    config.check()


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in METHODS])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_combines_with_every_base_model(method, preset):
    """The method's own values hold, unless the preset or a flag says otherwise."""
    flags = ["--method", method, "--preset", preset, "--dry-run"]  # nothing is looked for: the models are not here
    config = train.read(flags)
    config.check()
    assert type(config) is settings_of(method) and config.method == method
    said = PRESETS[preset] | {"preset": preset, "method": method, "dry_run": True}
    expected = asdict(settings_of(method)()) | said
    assert {k: v for k, v in asdict(config).items() if v != expected[k]} == {}
    assert train.read([*flags, "--ttur", "3", "--gan-weight", "0", "--dm-steps", "high"]).ttur == 3


def test_methods_of_their_own_presets():
    for method in ("dmd2", "dmdr", "advdmd"):
        by_preset, by_method = train.read(["--preset", method]), train.read(["--method", method])
        assert type(by_preset) is type(by_method) is settings_of(method)
        changed = {k for k, v in asdict(by_preset).items() if v != asdict(by_method)[k]}
        assert changed == {"preset", "iterations"} and by_preset.iterations == 2000
    c = train.read(["--method", "dmd2"])
    assert (c.dm_steps, c.ttur, c.ema, c.gan_weight, c.critic_weight) == ("all", 5, 1, 0.005, 0.01)
    assert type(train.read([])) is Config and train.read([]).method == "flash"


@pytest.mark.parametrize("method", METHODS)
def test_help_has_the_methods_own_flags_and_no_others(method, capsys):
    with pytest.raises(SystemExit) as end:
        train.read(["--method", method, "--help"])
    assert end.value.code == 0
    shown = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.M))
    settings = {f.name for f in fields(settings_of(method))}
    assert shown == {name.replace("_", "-") for name in settings}
    assert settings - {f.name for f in fields(Config)} == OWN[method]


@pytest.mark.parametrize(
    "flags", [["--critic-weight", "1"], ["--fake-lora", "4"], ["--method", "dmd2", "--judge", "a"]]
)
def test_another_methods_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        train.read(flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ") and flags[-2] in error


# ----------------------------------------------------------------------- run folders of before --method

BEFORE = {  # settings that every run had, whatever its method
    **{"critic_weight": 0.01, "fake_lora": 0, "dynamic": 0, "real_scale": 0.75, "reward_weight": 0.0},
    **{"reward_margin": 8.0, "rl_after": 100, "rl_gate": 0.6, "judge": ""},
}
TEXT = {"t5": "off", "text_length": 256, "cache_text": ""}  # settings of later that such a run goes on with
DMD = {"dm_steps": "all", "ttur": 5, "ema": 1.0}
OLD = {  # method -> a run's settings in that time
    "flash": {"gan": "pixel", "gan_weight": 0.05},
    "dmd2": {"gan": "latent", "gan_weight": 0.002, "critic_weight": 0.03, **DMD},
    "advdmd": {"gan": "online", "gan_weight": 1.0, "rl_after": 7, "rl_gate": 0.5, "candidates": 2, **DMD},
    "dmdr": {"gan": "pixel", "gan_weight": 0.0, "fake_lora": 8, "dynamic": 5, "reward_weight": 0.2, **DMD},
}


@pytest.fixture(params=OLD)
def old(request, tmp_path):
    """-> method, its settings, its run folder as it was written before --method existed."""
    settings = asdict(Config()) | BEFORE | OLD[request.param] | {"renoise": [0.1, 0.9], "lr": 1e-3}
    for later in ("method", "t5", "text_length"):
        del settings[later]
    run = tmp_path / "run"
    (run / "checkpoint-000002").mkdir(parents=True)
    (run / "checkpoint-000002" / "progress.json").write_text('{"loops": 2}')
    (run / "config.json").write_text(json.dumps(settings))
    return request.param, settings, run


def test_an_old_run_has_its_method(old):
    method, settings, run = old
    found = saved_settings(run)
    assert found == {k: v for k, v in settings.items() if k != "gan"} | {"method": method, "t5": "off"}
    assert run_folder.find_run(str(run)) == (run, found)


def test_an_old_run_goes_on_with_its_method_and_settings(old):
    method, settings, run = old
    config = run_folder.look(train.read(["--resume", "--out", str(run), "--iterations", "9"]))
    assert (
        type(config)
        is {"flash": Config, "dmd2": dmd2.Settings, "dmdr": dmdr.Settings, "advdmd": advdmd.Settings}[method]
    )
    given = {"method": method, "t5": "off", "resume": True, "iterations": 9, "out": str(run), "renoise": (0.1, 0.9)}
    expected = asdict(settings_of(method)()) | settings | given  # what did not exist then has its default
    assert {k: v for k, v in vars(config).items() if v != expected[k]} == {}


def test_a_run_does_not_go_on_with_another_method(old):
    method, _, run = old
    other = "dmd2" if method == "flash" else "flash"
    with pytest.raises(UserError, match=f"--method {method}, not {other}"):
        run_folder.look(train.read(["--resume", "--out", str(run), "--method", other]))


FLOATS = [
    (method, f.name)
    for method in METHODS
    for f in fields(settings_of(method))
    if f.type in (float, tuple, float | tuple)
]


@pytest.mark.parametrize("method, name", FLOATS)
def test_numbers_that_are_not_finite_are_refused(method, name):
    """No float of any method may be NaN or infinite; the message names its flag."""
    config = settings_of(method)()
    config.batch_size = 4  # whole groups of AdvDMD
    config.check()
    for value in (math.nan, math.inf, -math.inf):
        setattr(config, name, (0.1, value) if name == "renoise" else value)
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} must"):
            config.check()
