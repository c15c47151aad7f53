"""WebDataset shards, prompt files, cached latents: one order on any number of ranks; torn parts are named."""

import io
import json
import pickle
import tarfile
from dataclasses import replace

import fsspec
import pytest
import torch
from PIL import Image

from engine import data, latent_cache
from engine.config import Config
from engine.errors import UserError
from engine.models import Denoiser, load_denoiser, load_vae
from engine.prompts import PromptEncoder


def picture(value, kind="png"):
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (value, value, value)).save(out, kind)
    return out.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Two shards of twelve gray pictures: captions in .txt and in .json say the gray value."""
    for s in range(2):
        members = {}
        for i in range(12):
            value = 100 * s + i
            members[f"part/{value:03d}.png"] = picture(value)
            members[f"part/{value:03d}." + ("json" if s else "txt")] = (
                json.dumps({"text": f"gray {value}"}) if s else f"gray {value}\n"
            ).encode()
        write(tmp_path / f"shard-{s:02d}.tar", members)
    return tmp_path


@pytest.mark.parametrize("pattern", ["shard-{00..01}.tar", "shard-*.tar", "shard-{00,01}.tar"])
def test_shards_give_every_image_with_its_own_caption_once_an_epoch(shards, pattern):
    source = data.source(f"{shards}/{pattern}", 16, seed=3)
    epochs = [[source[i] for i in range(24 * e, 24 * e + 24)] for e in range(2)]
    for epoch in epochs:
        assert sorted(text for _, text, _ in epoch) == sorted(
            f"gray {100 * s + i}" for s in range(2) for i in range(12)
        )
        for image, text, _ in epoch:
            assert image.shape == (3, 16, 16)
            torch.testing.assert_close(image, torch.full_like(image, int(text.split()[1]) / 127.5 - 1))
    assert [t for _, t, _ in epochs[0]] != [t for _, t, _ in epochs[1]]


def test_shards_of_any_url_and_kind_of_picture(shards):
    """From fsspec's memory file system; JPEG and WebP beside PNG, with endings in capitals too."""
    kinds = {"a.jpg": "jpeg", "b.jpeg": "jpeg", "c.webp": "webp", "d.PNG": "png", "e.JPG": "jpeg"}
    members = {name: picture(50 + 10 * i, kind) for i, (name, kind) in enumerate(kinds.items())}
    write(
        shards / "kinds.tar",
        members | {f"{name[0]}.txt": f"gray {50 + 10 * i}".encode() for i, name in enumerate(kinds)},
    )
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/test_data/{path.name}": path.read_bytes() for path in shards.glob("*.tar")})
    for name, count in (("kinds.tar", 5), ("shard-{00..01}.tar", 24), ("*.tar", 29), ("simplecache", 29)):
        source = data.source(
            f"simplecache::file://{shards}/*.tar" if name == "simplecache" else f"memory://test_data/{name}", 16
        )
        loaded = [text for _, texts, *_ in data.batches(source, [list(range(count))], workers=1) for text in texts]
        assert loaded == [source[i][1] for i in range(count)]
        drawn = [source[i] for i in range(count)]
        assert len({text for _, text, _ in drawn}) == len(source.rows) == count and not source.bad
        for image, text, _ in drawn:
            torch.testing.assert_close(
                image, torch.full_like(image, int(text.split()[1]) / 127.5 - 1), rtol=0, atol=2.1 / 127.5
            )
    memory.rm("/test_data", recursive=True)


def test_shards_are_the_same_for_workers_ranks_and_a_resumed_run(shards):
    """Batches by two loading processes, and from the middle on, are those of one process."""
    name, whole = f"{shards}/shard-*.tar", [list(range(i, i + 4)) for i in range(0, 24, 4)]

    def texts(indices, workers):
        return [t for _, prompts, *_ in data.batches(data.source(name, 16), indices, workers) for t in prompts]

    straight = texts(whole, 0)
    assert texts(whole, 2) == straight and texts(whole[3:], 0) == straight[12:]
    ranks = [texts([part[2 * r : 2 * r + 2] for part in whole], 0) for r in range(2)]
    assert [t for a, b in zip(zip(*[iter(ranks[0])] * 2), zip(*[iter(ranks[1])] * 2)) for t in a + b] == straight


def test_torn_shards_and_bare_images_are_named_and_left_out(shards, capsys):
    torn, good = shards / "shard-01.tar", shards / "shard-00.tar"
    torn.write_bytes(torn.read_bytes()[:18000])
    write(
        shards / "shard-02.tar",
        {"a.png": picture(7), "a.txt": b"gray 7", "b.png": picture(8), "c.png": b"not a picture", "c.txt": b"broken"},
    )
    source = data.source(f"{shards}/shard-*.tar", 16)
    told = capsys.readouterr().out
    assert "shard-01.tar is torn" in told and "1 images of" in told and "shard-02" in told and "b.png" in told
    assert 20 <= len(source.rows) < 25
    drawn = [source[i][1] for i in range(len(source.rows))]
    assert "broken" not in drawn and "c.png (1 so far)" in capsys.readouterr().out
    good.write_bytes(b"nothing of a tar")
    for pattern, why in [
        ("shard-00.tar", "cannot read the shard"),
        ("none-*.tar", "matches no file"),
        ("none.tar", "cannot read the shard"),
    ]:
        with pytest.raises(UserError, match=why):
            data.source(f"{shards}/{pattern}", 16)


@pytest.mark.parametrize("damage", [b"\xff" * 512, bytes(512), bytes(1024), bytes(4096)])
def test_a_broken_header_is_not_the_end(damage, shards, capsys):
    """Garbage or zeros where the seventh picture's header was: tarfile stops there without a word.

    A whole shard ends in any number of zeros.
    """
    path = shards / "shard-00.tar"
    with tarfile.open(path) as tar:
        at = tar.getmember("part/006.png").offset
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
    assert len(data.source(path, 16).rows) == 6
    told = capsys.readouterr().out
    assert (
        "shard-00.tar is torn" in told
        and f"no header at byte {at}" in told
        and "what follows part/005.png is left out" in told
    )
    for content in (
        whole.rstrip(b"\0"),
        whole,
        whole + bytes(1 << 20),
    ):  # the last caption ends in "\n": its own padding goes first
        path.write_bytes(content + bytes(-len(content) % 512))
        assert len(data.source(path, 16).rows) == 12
        assert ("is torn (it has no end)" in capsys.readouterr().out) == (content < whole)


def test_prompt_file_replaces_the_captions(shards, tmp_path):
    lines = [f"prompt {i}" for i in range(5)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n\n")
    source, plain = (data.source(f"{shards}/shard-*.tar", 16, prompts=p) for p in (tmp_path / "prompts.txt", ""))
    assert sorted(source[i][1] for i in range(5)) == lines
    assert all(torch.equal(source[i][0], plain[i][0]) for i in range(5))
    (tmp_path / "empty.txt").write_text("\n")
    for name, why in [("empty.txt", "no prompt"), ("missing.txt", "no such file")]:
        with pytest.raises(UserError, match=why):
            data.source("toy", 64, prompts=tmp_path / name)


def test_sizes_are_those_of_the_original_and_its_crop(shards):
    """Of a picture 40 wide and 30 high, at 16: resized to 21 x 16, 2 cut off at the left. c carries them."""
    source = data.source(f"{shards}/shard-*.tar", 16)
    assert source[0][2].tolist() == [30, 40, 0, 2, 16, 16]
    assert data.source("toy", 64)[0][2].tolist() == [64, 64, 0, 0, 64, 64]
    sizes, encoder = torch.stack([source[i][2] for i in range(2)]), PromptEncoder("toy/sdxl", 64)
    assert torch.equal(encoder.encode(["a", "b"], sizes)["size"], sizes)
    assert encoder.encode(["a", "b"])["size"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2


def test_cached_latents_are_those_of_the_vae(shards, capsys):
    """The cache gives E(picture) in fp16, pictures are not read again; torn files and foreign folders are named."""
    name, folder, vae = f"{shards}/shard-*.tar", shards / "kept", load_vae("toy/sdxl")
    settings = Config(data=name, resolution=32, cache_latents=str(folder))
    plain, cached = data.source(name, 32), data.source(name, 32)
    latent_cache.fill(cached, vae, settings)
    for i in range(24):
        assert cached[i][1] == plain[i][1] and torch.equal(cached[i][2], plain[i][2])
        torch.testing.assert_close(cached[i][0], vae.encode(plain[i][0][None])[0], rtol=1e-3, atol=1e-3)
    again = data.source(name, 32)
    for shard in shards.glob("*.tar"):
        shard.unlink()
    latent_cache.fill(again, vae, settings)
    assert all(torch.equal(again[i][0], cached[i][0]) for i in range(24))
    spawned = pickle.loads(pickle.dumps(again))  # as a loader process that is not a fork gets it
    assert torch.equal(spawned[3][0], again[3][0])
    latent_cache.check(settings)
    with pytest.raises(UserError, match="another --cache-latents"):
        latent_cache.check(replace(settings, resolution=16))
    (shards / "mine").mkdir()
    (shards / "mine/diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="not a latent cache"):
        latent_cache.check(replace(settings, cache_latents=str(shards / "mine")))
    torn = next(folder.glob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(UserError, match="delete it"):
        [again[i] for i in range(24)]


@pytest.mark.xdist_group("ranks")
def test_two_ranks_share_the_encoding(shards, two_ranks):
    """Each encodes its half; both then have all. Pictures of 25 samples do not halve evenly, nor do turns of 4."""
    write(shards / "shard-02.tar", {"a.png": picture(7), "a.txt": b"gray 7"})
    two_ranks(FILL)
    assert len(list((shards / "kept").glob("*.safetensors"))) == 25


FILL = """
import torch, torch.distributed as dist
from engine import data, distributed, latent_cache
from engine.config import Config
from engine.models import load_vae

name, vae, encoded = f"{folder}/shard-*.tar", load_vae("toy/sdxl"), []
encode = vae.encode
vae.encode = lambda x: encoded.append(1) or encode(x)
source = data.source(name, 16)
config = Config(data=name, resolution=16, cache_latents=f"{folder}/kept")
latent_cache.fill(source, vae, config, dist.get_rank(), 2, together=4)
assert len(encoded) == (13, 12)[dist.get_rank()]
assert all(source[i][0].shape == (4, 4, 4) for i in range(25))
"""


def test_an_unreadable_picture_is_not_cached(shards, capsys):
    write(shards / "shard-02.tar", {"c.png": b"not a picture", "c.txt": b"broken"})
    source = data.source(f"{shards}/shard-*.tar", 16)
    latent_cache.fill(
        source, load_vae("toy/sdxl"), Config(data="shards", resolution=16, cache_latents=str(shards / "kept"))
    )
    assert "c.png (1 so far)" in capsys.readouterr().out
    assert "broken" not in [source[i][1] for i in range(25)]


def test_sizes_reach_the_network_unrounded():
    """SDXL's size conditions stay fp32 where the network computes in bf16, which knows no 1365."""
    denoiser, c = (
        load_denoiser("toy/sdxl"),
        PromptEncoder("toy/sdxl", 64, dtype=torch.bfloat16).encode(["a red circle"]),
    )
    seen, c["size"] = [], torch.tensor([[1365.0, 2731.0, 0, 683, 1024, 1024]])
    net = denoiser.net.bfloat16()
    net.register_forward_pre_hook(
        lambda net, args, given: seen.append(given["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    x_0 = Denoiser(net, denoiser.schedule, torch.bfloat16)(torch.randn(1, 4, 16, 16), torch.tensor([500]), c)
    assert torch.equal(seen[0], c["size"]) and x_0.isfinite().all()
