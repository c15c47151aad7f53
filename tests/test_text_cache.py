"""--cache-text: kept conditions are the encoders', whatever stops the encoding; runs that hold no text encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from engine import data, pictures, text_cache
from engine.errors import UserError
from engine.networks import assemble
from engine.prompts import load_encoder
from toy import world

PROMPTS = ["", *(f"{n} red circles" + " and more" * (n % 5) for n in range(40))]


def files(folder):
    """{name: content} of the prompts that are kept."""
    return {p.name: p.read_bytes() for p in Path(folder).glob("text-*/*.safetensors")}


@pytest.mark.parametrize("model", ["toy/sdxl", "T5"])
def test_kept_conditions_are_the_encoders(model, sd3_t5, tmp_path):
    """Also the null one, and SDXL's sizes; they are memory-mapped; another length of T5's is another encoder's."""
    model = sd3_t5 if model == "T5" else model
    encoder, kept = load_encoder(model, 64), load_encoder(model, 64, loaded=False)
    text_cache.fill(kept, PROMPTS, tmp_path)
    assert kept.encoders == kept.tokenizers == ()
    asked = [PROMPTS[i] for i in (7, 0, 33)]
    for sizes in (None, torch.arange(18.0).view(3, 6)):
        ours, theirs = kept.encode(asked, sizes), encoder.encode(asked, sizes)
        assert ours.keys() == theirs.keys()
        for name, v in theirs.items():
            torch.testing.assert_close(ours[name], v, atol=1e-5, rtol=1e-4)
    for name, v in encoder.null().items():
        torch.testing.assert_close(kept.null()[name], v, atol=1e-5, rtol=1e-4)
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


RUN = "--iterations 2 --batch-size 2 --ttur 1 --log-every 1 --preview-every 2 --seed 3"


def trained(model, photos, out, *more):
    return train.train(train.read([*f"--model {model} --data {photos} {RUN} --out {out}".split(), *more]))


@pytest.mark.parametrize("method", ["flash", "dmd2", "dmdr", "advdmd"])
def test_every_method_trains_without_text_encoders(method, small_toys, photos, tmp_path, monkeypatch):
    """The same losses as with them. A second run loads none; DMDR's reward model has encoders of its own, kept too."""
    own = ["--method", method, "--watch", str(tmp_path / "watch.txt")]
    own += {"dmdr": ["--dynamic", "1"], "advdmd": ["--rl-after", "0", "--candidates", "2"]}.get(method, [])
    (tmp_path / "watch.txt").write_text("a large red ring\n")
    flags = [*own, "--cache-text", str(tmp_path / "kept")]
    runs = [trained(small_toys["sdxl"], photos, tmp_path / "with", *own)]
    runs.append(trained(small_toys["sdxl"], photos, tmp_path / "first", *flags))
    assert len(list((tmp_path / "kept").glob("text-*"))) == (2 if method == "dmdr" else 1)
    assert len(files(tmp_path / "kept")) == 9 * (2 if method == "dmdr" else 1)  # null, 7 captions, --watch

    monkeypatch.setattr("engine.prompts.PromptEncoder.load", lambda self: pytest.fail("loaded"))
    if method != "dmdr":  # a reward model is loaded with its encoders
        runs.append(trained(small_toys["sdxl"], photos, tmp_path / "again", *flags))
    logged = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for other in logged[1:]:
        for before, after in zip(logged[0], other, strict=True):
            before.pop("seconds"), after.pop("seconds")
            assert after == pytest.approx(before, rel=1e-2, abs=1e-3)


def test_stage_2_trains_without_text_encoders(small_toys, photos, tmp_path):
    flags = ["--cache-text", str(tmp_path / "kept")]
    before = trained(small_toys["sdxl"], photos, tmp_path / "one")
    run = trained(small_toys["sdxl"], photos, tmp_path / "two", "--stage", "2", "--init", str(before), *flags)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("rl_loss" in m for m in logged) and any("held_out_reward" in m for m in logged)
    assert len(list((tmp_path / "kept").glob("text-*"))) == 2
    config = train.look(train.read(["--stage", "2", "--init", str(before), *flags, "--resume", "--out", str(run)]))
    nets = assemble(config, 1, torch.device("cpu"), train.prepare, data.source(config.data, 64))
    assert nets.encoder.encoders == nets.R.encoder.encoders == ()


@pytest.mark.xdist_group("ranks")
def test_two_ranks_equal_one(sd3_t5, photos, tmp_path, two_ranks):
    """Each encodes its share: the same cache to the bit, the same student but for rounding. The prompts are --prompts."""
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS[1:]))
    (tmp_path / "model").symlink_to(sd3_t5)
    two_ranks(TWO)
    flags = ["--prompts", str(tmp_path / "prompts.txt"), "--cache-text", str(tmp_path / "kept-1")]
    one = train.train(train.read([*f"--model {sd3_t5} {RUN} --out {tmp_path / 'one'}".split(), *flags]))
    assert files(tmp_path / "kept-1") == files(tmp_path / "kept-2") and len(files(tmp_path / "kept-1")) == len(PROMPTS)
    students = [
        run / "checkpoint-000002/transformer/diffusion_pytorch_model.safetensors" for run in (one, tmp_path / "two")
    ]
    a, b = (text_cache.safe_open(path, "pt") for path in students)
    for name in a.keys():
        torch.testing.assert_close(a.get_tensor(name), b.get_tensor(name), atol=2e-5, rtol=1e-3)


TWO = f"""
import train
flags = "--model {{0}}/model {RUN} --prompts {{0}}/prompts.txt --cache-text {{0}}/kept-2 --out {{0}}/two".format(folder)
train.train(train.read(flags.split()))
"""
