"""--cache-text: kept conditions are the encoders', whatever stops the encoding; runs that hold no text encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from engine import data, pictures, run_folder, text_cache
from engine.errors import UserError
from engine.networks import assemble
from engine.prompts import load_encoder
from toy import world

PROMPTS = ["", *(f"{n} red circles" + " and more" * (n % 5) for n in range(40))]


def files(folder):
    """{name: content} of the prompts that are kept."""
    return {p.name: p.read_bytes() for p in Path(folder).glob("text-*/*.safetensors")}


@pytest.mark.parametrize("model", ["toy/sdxl", "T5", "qwen", "z-image"])
def test_kept_conditions_are_the_encoders(model, base_models, sd3_t5, tmp_path):
    """Also the null one, SDXL's sizes and masks; they are memory-mapped; another length of T5's is another encoder's.

    What is kept of a prompt has no padding.
    """
    model = sd3_t5 if model == "T5" else base_models.get(model, model)
    encoder, kept = load_encoder(model, 64), load_encoder(model, 64, loaded=False)
    text_cache.fill(kept, [*PROMPTS, " "], tmp_path)
    assert kept.encoders == kept.tokenizers == ()
    asked = [PROMPTS[i] for i in (7, 0, 33)]
    for sizes in (None, torch.arange(18.0).view(3, 6)):
        ours, theirs = kept.encode(asked, sizes), encoder.encode(asked, sizes)
        assert ours.keys() == theirs.keys()
        for name, v in theirs.items():
            torch.testing.assert_close(ours[name], v, atol=1e-5, rtol=1e-4)
    for name, v in encoder.null().items():
        torch.testing.assert_close(kept.null()[name], v, atol=1e-5, rtol=1e-4)
    assert all(kept.kept.read(prompt).get("mask", torch.ones(1)).all() for prompt in asked)
    one = kept.kept.read(asked[0])
    assert str(kept.kept.place(asked[0])) in Path("/proc/self/maps").read_text() and one["tokens"].shape[0] == 1
    with pytest.raises(UserError, match="lacks the prompt 'a blue"):
        kept.encode(["a blue ring"])
    torn = kept.kept.place(asked[2])
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(UserError, match="delete it"):
        kept.encode(asked)
    if model == sd3_t5:
        shorter = load_encoder(model, 64, text_length=99)
        text_cache.fill(shorter, PROMPTS, tmp_path)
        assert shorter.encode(asked)["tokens"].shape[1] == 77 + 99 and kept.encode(asked[:2])["tokens"].shape[1] == 333


def test_another_encoder_is_told_by_its_weights(sd3_t5, tmp_path):
    """The same files elsewhere are the same encoder; one changed number at the end makes another."""
    copy = tmp_path / "copy"
    shutil.copytree(sd3_t5, copy)
    assert load_encoder(copy, 64).identity() == load_encoder(sd3_t5, 64).identity()
    weights = copy / "text_encoder_3/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert load_encoder(copy, 64).identity() != load_encoder(sd3_t5, 64).identity()


def test_a_stopped_encoding_goes_on(sd3_t5, tmp_path, monkeypatch, capsys):
    """After a kill within the second chunk, what is there is kept and the rest encoded: in all the same bits."""
    text_cache.fill(load_encoder(sd3_t5, 64), PROMPTS, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert len(whole) == len(PROMPTS)
    write = text_cache.Kept.write
    left = iter(range(20))

    def stops(self, *args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(text_cache.Kept, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        text_cache.fill(load_encoder(sd3_t5, 64), PROMPTS, tmp_path / "parts")
    assert len(files(tmp_path / "parts")) == 20
    monkeypatch.setattr(text_cache.Kept, "write", write)
    encoder, encoded = load_encoder(sd3_t5, 64), []
    text = encoder.text
    encoder.text = lambda prompts: encoded.append(prompts) or text(prompts)
    capsys.readouterr()
    text_cache.fill(encoder, PROMPTS, tmp_path / "parts")
    assert files(tmp_path / "parts") == whole and encoded == [PROMPTS[16:32], PROMPTS[32:]]
    shorter = load_encoder(sd3_t5, 64, text_length=30)
    text_cache.fill(shorter, PROMPTS, tmp_path / "parts")
    assert f"warning: {sum(n % 5 > 1 for n in range(40))} of 41 prompts are cut off after 30" in capsys.readouterr().err


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of six pictures; the first has two captions."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for i in range(6):
        scene, caption = world.scene(i, "train")
        pictures.to_pil(world.render(scene)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": [caption, "a picture"] if i == 0 else caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


RATES = "--lr 2e-6 --fake-lr 1e-5 --d-lr 1e-5"  # low: AdamW makes whole steps of rounding
RUN = f"--batch-size 2 --ttur 1 --log-every 1 --save-every 9 {RATES}"


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(model, photos, out, *more):
    return train.train(train.read([*f"--model {model} --data {photos} {RUN} --out {out}".split(), *more]))


@pytest.mark.parametrize("method", ["flash", "dmdr", "advdmd"])  # AdvDMD trains DMD2's discriminator
def test_every_method_trains_without_text_encoders(method, small_toys, photos, tmp_path, monkeypatch):
    """The same loop as with them. A second run loads none. The reward model of the toy has the same ones: one cache."""
    own = ["--method", method, "--iterations", "1", "--preview-every", "0"]
    own += {"dmdr": ["--dynamic", "0"], "advdmd": ["--rl-after", "0", "--candidates", "2"]}.get(method, [])
    flags = [*own, "--cache-text", str(tmp_path / "kept")]
    runs = [trained(small_toys["sdxl"], photos, tmp_path / "with", *own)]
    runs.append(trained(small_toys["sdxl"], photos, tmp_path / "first", *flags))
    assert len(files(tmp_path / "kept")) == 8  # 7 captions and the null prompt
    if method == "flash":
        monkeypatch.setattr("engine.prompts.PromptEncoder.load", lambda self: pytest.fail("loaded"))
        runs.append(trained(small_toys["sdxl"], photos, tmp_path / "again", *flags))
    for other in runs[1:]:
        for before, after in zip(metrics(runs[0]), metrics(other), strict=True):
            before["seconds"] = after["seconds"]
            assert after == pytest.approx(before, rel=1e-2, abs=1e-3)


def test_stage_2_trains_without_text_encoders(small_toys, photos, tmp_path):
    """Preferences, previews, held-out scores and --watch; the reward model's encoders leave too."""
    before = trained(small_toys["sdxl"], photos, tmp_path / "one", "--iterations", "1", "--preview-every", "0")
    (tmp_path / "watch.txt").write_text("a large red ring\n")
    more = ["--watch", str(tmp_path / "watch.txt"), "--cache-text", str(tmp_path / "kept")]
    stage_2 = ["--stage", "2", "--init", str(before), "--iterations", "1", "--preview-every", "1", *more]
    run = trained(small_toys["sdxl"], photos, tmp_path / "two", *stage_2)
    assert {"rl_loss", "held_out_reward", "watch_reward"} <= {name for line in metrics(run) for name in line}
    assert len(files(tmp_path / "kept")) == 9
    config = run_folder.look(train.read(["--resume", "--out", str(run)]))
    nets = assemble(config, 1, torch.device("cpu"), train.prepare, data.source(config.data, 64))
    assert nets.encoder.encoders == nets.R.encoder.encoders == ()
