"""Pictures, captions and prompts as people save them, shards, cached latents: read right, or named; one order."""

import csv
import io
import json
import pickle
import sys
import tarfile
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from engine import data, decode, latent_cache, layouts, text
from engine.config import Config
from engine.errors import UserError
from engine.models import Denoiser, load_denoiser, load_vae
from engine.prompts import PromptEncoder
from engine.reward_training import Pairs


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
        assert sorted(said for _, said, _ in epoch) == sorted(
            f"gray {100 * s + i}" for s in range(2) for i in range(12)
        )
        for image, said, _ in epoch:
            assert image.shape == (3, 16, 16)
            torch.testing.assert_close(image, torch.full_like(image, int(said.split()[1]) / 127.5 - 1))
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
        loaded = [said for _, texts, *_ in data.batches(source, [list(range(count))], workers=1) for said in texts]
        assert loaded == [source[i][1] for i in range(count)]
        drawn = [source[i] for i in range(count)]
        assert len({said for _, said, _ in drawn}) == len(source.rows) == count and not source.bad
        for image, said, _ in drawn:
            torch.testing.assert_close(
                image, torch.full_like(image, int(said.split()[1]) / 127.5 - 1), rtol=0, atol=2.1 / 127.5
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
    assert "shard-01.tar is torn" in told and "1 images without a caption" in told and "shard-02.tar/b.png" in told
    assert 20 <= len(source.rows) < 25
    drawn = [source[i][1] for i in range(len(source.rows))]
    assert "broken" not in drawn and "c.png (1 so far)" in capsys.readouterr().out
    good.write_bytes(b"nothing of a tar")
    for pattern, why in [
        ("shard-00.tar", "cannot read the shard"),
        ("none-*.tar", "matches no file"),
        ("none.tar", "no such file"),
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


# ------------------------------------------------------------------------------------------- what a viewer shows


def saved(image, kind, **how):
    """A picture as a file in memory."""
    out = io.BytesIO()
    image.save(out, kind, **how)
    out.seek(0)
    return out


def in_folder(folder, pictures, captions=None):
    """A folder with {file name: bytes} and a metadata.jsonl, a caption for each; by default its name."""
    folder.mkdir(exist_ok=True)
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    rows = [{"file_name": name, "text": (captions or {}).get(name, name)} for name in pictures]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def levels(picture, *places):
    """The colours (0 to 255) of a picture (3, H, W) at (y, x)."""
    return [((picture[:, y, x] + 1) * 127.5).round().int().tolist() for y, x in places]


STORED = {  # EXIF orientation -> how an upright picture is turned to be stored with it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
def test_pictures_stand_upright(kind, tmp_path):
    """Lime and red above blue, stored in all eight orientations; sizes are the upright picture's."""
    upright = Image.new("RGB", (60, 80), "blue")
    upright.paste("red", (0, 0, 60, 40))
    upright.paste("lime", (0, 0, 30, 40))
    for orientation in (0, 1, *STORED, 99):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turn = STORED.get(orientation)
        stored = upright if turn is None else upright.transpose(turn)
        picture, sizes = decode.read(saved(stored, kind, exif=exif), 48)
        assert sizes.tolist() == [80, 60, 8, 0, 48, 48]
        for seen, colour in zip(levels(picture, (4, 4), (4, 43), (43, 4)), ([0, 255, 0], [255, 0, 0], [0, 0, 255])):
            assert max(abs(a - b) for a, b in zip(seen, colour)) < 25, (orientation, seen)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"garbage",
        b"II*\0\x08\0\0\0\xff\xff",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0",
    ],
)
def test_broken_exif_is_ignored(exif):
    for kind in ("jpeg", "png", "webp"):
        picture, _ = decode.read(saved(Image.new("RGB", (60, 80), "red"), kind, exif=b"Exif\0\0" + exif), 16)
        assert levels(picture, (8, 8))[0][0] > 240


def paletted():
    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 0, 0, 0, 0, 255] + 762 * [0])
    image.paste(1, (16, 16, 48, 48))
    return image


def cut_out():
    """A blue square on a ground that is transparent, and red under it."""
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (16, 16, 48, 48))
    return image


def greys(low, high, kind):
    values = np.full((64, 64), low, kind)
    values[16:48, 16:48] = high
    return Image.fromarray(values)


WHITE, BLACK, BLUE = [255] * 3, [0] * 3, [0, 0, 255]
SEEN = {  # a picture as a file -> what a viewer shows in its corner and in its middle
    "RGBA": (saved(cut_out(), "png"), WHITE, BLUE),
    "RGBA, webp": (saved(cut_out(), "webp", lossless=True), WHITE, BLUE),
    "RGBA, tiff": (saved(cut_out(), "tiff"), WHITE, BLUE),
    "half transparent": (saved(Image.new("RGBA", (64, 64), (0, 0, 255, 51)), "png"), [204, 204, 255], [204, 204, 255]),
    "palette with alphas": (saved(paletted(), "png", transparency=b"\0\xff"), WHITE, BLUE),
    "palette with a transparent colour": (saved(paletted(), "png", transparency=0), WHITE, BLUE),
    "gif": (saved(paletted(), "gif", transparency=0), WHITE, BLUE),
    "animated gif": (
        saved(paletted(), "gif", save_all=True, append_images=[Image.new("P", (64, 64))]),
        [255, 0, 0],
        BLUE,
    ),
    "RGB with a transparent colour": (saved(paletted().convert("RGB"), "png", transparency=(255, 0, 0)), WHITE, BLUE),
    "L with a transparent grey": (saved(greys(10, 200, np.uint8), "png", transparency=10), WHITE, [200] * 3),
    "LA": (saved(Image.merge("LA", (greys(10, 200, np.uint8), greys(0, 255, np.uint8))), "png"), WHITE, [200] * 3),
    "1": (saved(greys(0, 255, np.uint8).convert("1"), "png"), BLACK, WHITE),
    "16 bits": (saved(greys(257 * 9, 257 * 200, np.uint16), "png"), [9] * 3, [200] * 3),
    "16 bits, tiff": (saved(greys(257 * 9, 257 * 200, np.uint16), "tiff"), [9] * 3, [200] * 3),
    "16 bits with a transparent grey": (saved(greys(500, 51400, np.uint16), "png", transparency=500), WHITE, [200] * 3),
    "32 bits": (saved(greys(257 * 9, 257 * 200, np.int32), "tiff"), [9] * 3, [200] * 3),
    "32 bits, signed": (saved(greys(-5000, 70000, np.int32), "tiff"), BLACK, WHITE),
    "floats to 1": (saved(greys(0.2, 0.8, np.float32), "tiff"), [51] * 3, [204] * 3),
    "floats to 255": (saved(greys(51, 204, np.float32), "tiff"), [51] * 3, [204] * 3),
    "floats, NaN": (saved(greys(np.nan, 0.8, np.float32), "tiff"), BLACK, [204] * 3),
    "CMYK": (saved(paletted().convert("RGB").convert("CMYK"), "tiff"), [255, 0, 0], BLUE),
    "CMYK, jpeg": (saved(paletted().convert("RGB").convert("CMYK"), "jpeg", quality=100), [255, 0, 0], BLUE),
    "YCbCr": (saved(paletted().convert("RGB").convert("YCbCr"), "tiff"), [254, 0, 0], [0, 0, 254]),
    "LAB": (saved(greys(0, 255, np.uint8).convert("RGB").convert("LAB"), "tiff"), BLACK, WHITE),
}


@pytest.mark.parametrize("name", SEEN)
def test_pictures_are_what_a_viewer_shows(name, tmp_path):
    file, corner, middle = SEEN[name]
    source = data.source(in_folder(tmp_path / "folder", {"a.png": file.getvalue()}), 64)
    for seen, right in zip(levels(source.load("a.png")[0], (2, 2), (32, 32)), (corner, middle)):
        assert max(abs(a - b) for a, b in zip(seen, right)) <= 2, seen


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "HSV", "I;16B", "I;16L", "RGBX", "LAB", "F", "1", "CMYK"])
def test_every_mode_of_pillow(mode):
    """Modes that no file has, or few: nearly black stays so, and white."""
    grey = greys(0, 255, np.uint8)
    if mode.startswith("I;16"):
        image = Image.frombytes(
            mode, (64, 64), (np.asarray(grey) * 257.0).astype({"B": ">u2", "L": "<u2"}[mode[-1]]).tobytes()
        )
    else:
        through = {"La": "LA", "RGBa": "RGBA", "PA": "P", "LAB": "RGB", "HSV": "RGB"}
        image = grey.convert(through.get(mode, mode)).convert(mode)
    seen = decode.as_seen(image)
    assert seen.mode == "RGB" and max(seen.getpixel((2, 2))) <= 4 and min(seen.getpixel((32, 32))) >= 251


@pytest.mark.parametrize("size", [(300, 200), (90, 517), (64, 64), (65, 64), (500, 64)])
def test_the_crop_is_that_of_the_resized_picture(size):
    """By another route: resize all of it, then crop."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(noise)
    resized, left, top = decode.crop(picture, 64)
    whole = picture.resize(resized, Image.Resampling.LANCZOS).crop((left, top, left + 64, top + 64))
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(decode.pixels(picture, 64), expected, rtol=0, atol=1.01 / 127.5)


def test_extreme_shapes_and_lack_of_memory_are_passed_over(tmp_path, capsys, monkeypatch):
    """Named, and no reason to end a run while any picture is left. Nothing of 600 x 1 pixels is made 38,400 wide."""
    shapes = {
        "thin.png": (600, 1),
        "wide.png": (97, 12),
        "small.png": (7, 7),
        "good.png": (96, 12),
        "least.png": (8, 9),
    }
    pictures = {name: saved(Image.new("RGB", size), "png").getvalue() for name, size in shapes.items()}
    source = data.source(in_folder(tmp_path / "folder", pictures), 64)
    assert {source[i][1] for i in range(10)} == {"good.png", "least.png"}
    told = capsys.readouterr().out
    assert "thin.png (" in told and "wide.png (" in told and "97 x 12" in told and "1/8 of 64" in told

    def out_of_memory(image):
        raise MemoryError

    monkeypatch.setattr(decode, "as_seen", out_of_memory)
    with pytest.raises(UserError, match="none of the 5 images .* memory"):
        data.source(tmp_path / "folder", 64)[0]


def test_what_cannot_be_read_is_passed_over(tmp_path, capsys):
    """Truncated files of any kind, no files, folders, no pictures: none is an error of its own kind."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    kinds = ("png", "jpeg", "webp", "gif", "tiff", "bmp", "avif")
    broken = {f"cut.{kind}": saved(image, kind).getvalue()[:-500] for kind in kinds}
    broken |= {"empty.png": b"", "text.png": b"<html>not found</html>", "header.png": b"\x89PNG\r\n\x1a\n" + bytes(40)}
    for content in broken.values():
        with pytest.raises(decode.Unreadable):
            decode.read(io.BytesIO(content), 64)
    bomb = saved(Image.new("1", (20000, 20000)), "png").getvalue()
    good = {f"{i}.png": picture(i) for i in range(57)}
    folder = in_folder(tmp_path / "folder", good | {"bomb.png": bomb, "gone.png": b"", "dir.png": b""})
    (folder / "gone.png").unlink()
    (folder / "dir.png").unlink()
    (folder / "dir.png").mkdir()
    source = data.source(folder, 16)
    assert {source[i][1] for i in range(60)} == set(good) and len(source.bad) == 3
    (folder / "0.png").write_bytes(broken["cut.png"])
    with pytest.raises(UserError, match="more than 5 %.*bomb|more than 5 %.*gone"):
        [source[i] for i in range(60)]


# ------------------------------------------------------------------------------------------------------ text


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le with BOM", "utf-16-be with BOM")


def encoded(said, encoding):
    name, _, bom = encoding.partition(" with ")
    return (("\ufeff" if bom else "") + said).encode(name)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_in_every_place_is_read_in_every_encoding(encoding, tmp_path):
    """And lines end at \\n or \\r\\n alone: not at U+2028, \\x0b or \\x85."""
    first, second = "caf\u00e9 \u5927\u2028under a sky", "two\x0brings\x85 \U0001f600"
    for ends in ("\n", "\r\n"):
        (tmp_path / "prompts.txt").write_bytes(encoded(first + ends + ends + f"  {second} ", encoding))
        assert text.prompts(tmp_path / "prompts.txt") == [first, second]
        rows = [{"file_name": f"{i}.png", "text": said} for i, said in enumerate((first, second))]
        lines = ends.join(json.dumps(row, ensure_ascii=False) for row in rows)
        folder = in_folder(tmp_path / "folder", {"0.png": picture(0), "1.png": picture(1)})
        (folder / "metadata.jsonl").write_bytes(encoded(lines, encoding))
        assert dict(data.source(folder, 16).rows) == {"0.png": first, "1.png": second}
    write(
        tmp_path / "0.tar",
        {
            "a.png": picture(0),
            "a.txt": encoded(first, encoding),
            "b.png": picture(1),
            "b.json": encoded(json.dumps({"text": second}, ensure_ascii=False), encoding),
        },
    )
    assert [said for _, said in data.source(tmp_path / "0.tar", 16).rows] == [first, second]
    row = {"caption": first, "jpg_0_file_name": "0.png", "jpg_1_file_name": "1.png", "label_0": 1}
    pairs = "\n".join([json.dumps(row, ensure_ascii=False)] * 2)
    (folder / "metadata.jsonl").write_bytes(encoded(pairs, encoding))
    assert Pairs(folder, 16, 0)[0][1] == first


BAD = {"cp1252": "caf\u00e9 no {}".encode("cp1252"), "NUL": b"a\0b", "UTF-16 without a BOM": "cat".encode("utf-16-le")}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("place", ["jsonl", "csv", "prompts", "tar", "beside"])
def test_bytes_that_are_no_text_are_named_and_counted(place, kind, tmp_path, capsys):
    """One of forty captions is left out; three end the run, with their lines."""

    def read(bad):
        captions = [BAD[kind] if i in bad else b"gray %d" % i for i in range(40)]
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        for i in range(40):
            (folder / f"{i}.png").write_bytes(picture(i))
            if place == "beside":
                (folder / f"{i}.txt").write_bytes(captions[i])
        if place == "jsonl":
            lines = [b'{"file_name": "%d.png", "text": "%s"}' % row for row in enumerate(captions)]
            (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
        if place == "csv":
            lines = [b'%d.png,"%s"' % row for row in enumerate(captions)]
            (folder / "metadata.csv").write_bytes(b"\n".join([b"file_name,text", *lines]))
        if place == "prompts":
            (tmp_path / "prompts.txt").write_bytes(b"\n".join(captions))
            return text.prompts(tmp_path / "prompts.txt")
        if place == "tar":
            write(
                tmp_path / "0.tar",
                {f"{i}.png": picture(i) for i in range(40)} | {f"{i}.txt": captions[i] for i in range(40)},
            )
            folder = tmp_path / "0.tar"
        return [said for _, said in data.source(folder, 16).rows]

    where = {
        "jsonl": "line {}",
        "csv": "line {}",
        "prompts": "line {}",
        "tar": "/{}.txt, line 1",
        "beside": "{}.txt, line 1",
    }[place]
    first = {"jsonl": 1, "csv": 2, "prompts": 1}.get(place, 0)
    left = read({7})
    told = capsys.readouterr().out
    assert len(left) == 39 and "gray 7" not in left and "1 of 40" in told and where.format(7 + first) in told
    with pytest.raises(UserError, match="3 of 40 .*more than 5 %.*" + where.format(9 + first)):
        read({9, 11, 13})


@pytest.mark.parametrize("caption", [5, {"en": "a cat"}, [["a cat"]], ["a cat", None], True, 0])
def test_captions_of_other_types_are_refused_by_name(caption, tmp_path):
    folder = in_folder(tmp_path / "folder", {"a.png": picture(0), "b.png": picture(0)}, {"b.png": caption})
    with pytest.raises(UserError, match="line 2: the caption must be"):
        data.source(folder, 16)
    write(tmp_path / "0.tar", {"a.png": picture(0), "a.json": json.dumps({"caption": caption}).encode()})
    with pytest.raises(UserError, match="a.json: the caption must be"):
        data.source(tmp_path / "0.tar", 16)


def test_one_of_several_captions_is_drawn(tmp_path):
    """By (seed, epoch, sample): all in turn, the same ones in loader processes; previews show the first."""
    several = ["one", "two ", "", "three"]
    members = {f"{i}.png": picture(i) for i in range(4)}
    write(
        tmp_path / "0.tar",
        members
        | {
            f"{i}.json": json.dumps({"caption": [f"{word} {i}" * bool(word) for word in several]}).encode()
            for i in range(4)
        },
    )
    folder = in_folder(tmp_path / "folder", members, dict.fromkeys(members, several))
    for where in (tmp_path / "0.tar", folder):
        source = data.source(where, 16, seed=1)
        drawn = [source[i][1] for i in range(80)]
        assert {said.split()[0] for said in drawn} == {"one", "two", "three"}
        again = [
            said for _, part, *_ in data.batches(data.source(where, 16, seed=1), [list(range(80))], 1) for said in part
        ]
        assert again == drawn != [data.source(where, 16, seed=2)[i][1] for i in range(80)]
        assert all(said.startswith("one") for said in source.prompts(4))


# --------------------------------------------------------------------------------------------------- layouts


SAID = {"a/0.png": "gray 0", "a/b/1.JPEG": "gray 1, a comma", "a/b/2.5.tif": 'gray "2"\nand a line'}


def put_table(folder, kind, inside=""):
    names = [name.removeprefix(inside) for name in SAID]
    if kind == "jsonl":
        rows = [json.dumps({"file_name": name, "text": said}) for name, said in zip(names, SAID.values())]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    if kind == "csv":
        with open(folder / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
            table = csv.writer(file)
            table.writerows([("caption", "file_name"), *zip(SAID.values(), names)])
    if kind == "parquet":
        table = pyarrow.table({"file_name": names, "n": [1, 2, 3], "text": list(SAID.values())})
        pyarrow.parquet.write_table(table, folder / "metadata.parquet")


def put_beside(folder):
    for name, said in SAID.items():
        (folder / name).with_suffix(".txt").write_text(said)


def put_tars(folder):
    for i, (name, said) in enumerate(SAID.items()):
        (folder / f"part {i}").mkdir()
        (folder / f"part {i}/._shard[{i}].tar").write_bytes(b"of macOS")
        kind = name.rpartition(".")[2]
        write(folder / f"part {i}/shard[{i}].tar", {f"x.{kind}": picture(i), "x.TXT": said.encode()})


LAYOUTS = {
    "jsonl": lambda folder: put_table(folder, "jsonl"),
    "csv": lambda folder: put_table(folder, "csv"),
    "parquet": lambda folder: put_table(folder, "parquet"),
    "table in a subfolder": lambda folder: put_table(folder / "a", "csv", "a/"),
    "beside": put_beside,
    "tars": put_tars,
}


@pytest.mark.parametrize("inside", ["", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_people_have(layout, inside, tmp_path):
    folder = tmp_path / "data[1]" / inside
    (folder / "a/b").mkdir(parents=True)
    for i, name in enumerate(SAID):
        if layout != "tars":
            (folder / name).write_bytes(picture(i, "tiff" if name.endswith("tif") else name.rpartition(".")[2].lower()))
    LAYOUTS[layout](folder)
    (folder / ".ds_store").write_text("hidden")
    layouts.check(tmp_path / "data[1]")
    source = data.source(tmp_path / "data[1]", 16)
    found = {said: image for image, said, _ in (source[i] for i in range(3))}
    assert set(found) == set(SAID.values())
    for i, said in enumerate(SAID.values()):
        assert levels(found[said], (8, 8)) == [[i, i, i]]


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, "holds nothing; what works: a metadata.jsonl"),
        ({"a.png": b"", "b.png": b"", "notes.md": b"x"}, "holds pictures without captions: 2 .png, 1 .md"),
        ({"train-00000-of-00001.parquet": b"x"}, "holds 1 .parquet"),
        (
            {"metadata.jsonl": b'{"image": "a.png", "caption": "a"}'},
            'line 1: needs "file_name" and "text".*has "image", "caption"',
        ),
        ({"metadata.jsonl": b'{"file_name": "a.png", "label": 1}'}, 'line 1: needs .* has "file_name", "label"'),
        ({"metadata.jsonl": b'[{"file_name": "a.png", "text": "a"}]'}, "line 1: a JSON list"),
        ({"metadata.jsonl": b'{"file_name": 7, "text": "a"}'}, "line 1: file_name must be a text, not 7"),
        ({"metadata.jsonl": b"[" * 100000}, "line 1: no JSON object"),
        ({"metadata.csv": b"file_name;text\na.png;a"}, 'line 2: needs .* has "file_name;text"'),
        ({"metadata.csv": b"file_name,text\na.png,a cat, a dog"}, "line 2: more fields .* in quotes"),
        ({"metadata.csv": b"file_name,text\na.png"}, "line 2: the caption of a.png is empty"),
        ({"metadata.csv": b""}, "names no image"),
        ({"metadata.parquet": b"x"}, "cannot read .*metadata.parquet"),
    ],
)
def test_what_is_not_understood_is_answered_with_what_was_found(files, words, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        layouts.check(tmp_path)


def test_names_that_are_no_data(tmp_path, monkeypatch):
    (tmp_path / "metadata.jsonl").write_text("")
    (tmp_path / "a.zip").write_text("")
    (tmp_path / "0.tar.gz").write_text("")
    for name, words in [
        ("metadata.jsonl", "give its folder"),
        ("a.zip", "is a file"),
        ("*.tar.gz", "no .tar file"),
        ("none", "no such folder"),
        ("{0..3}.tar", "no such file: .*0.tar"),
    ]:
        with pytest.raises(UserError, match=words):
            layouts.check(f"{tmp_path}/{name}")
    with pytest.raises(UserError, match="fsspec"):
        layouts.check("pipe:curl http://host/a.tar")
    (tmp_path / "metadata.jsonl").rename(tmp_path / "metadata.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        layouts.check(tmp_path)


def test_brackets_in_names_are_taken_as_they_are_where_such_files_exist(tmp_path):
    folder = tmp_path / "v[2]"
    folder.mkdir()
    for name in ("a[1].tar", "a1.tar", "b{x}.tar"):
        write(folder / name, {"k.png": picture(0), "k.txt": name.encode()})
    for pattern, names in {
        "v[2]/a[1].tar": ["a[1].tar"],
        "v[2]/a1.tar": ["a1.tar"],
        "v[2]/a[0-9].tar": ["a1.tar"],
        "v[2]/a*.tar": ["a1.tar", "a[1].tar"],
        "v[2]/b{x}.tar": ["b{x}.tar"],
        "v[2]/{a1,a[1]}.tar": ["a1.tar", "a[1].tar"],
    }.items():
        assert [said for _, said in data.source(f"{tmp_path}/{pattern}", 16).rows] == names, pattern


def test_what_shards_hold_beside_samples_is_named_and_counted(tmp_path, capsys):
    good = {"a.tif": picture(1, "tiff"), "a.txt": b"one", "b.GIF": picture(2, "gif"), "b.json": b'{"caption": "two"}'}
    others = {
        "0.5_dog.jpg": picture(3, "jpeg"),
        "0.5_dog.txt": b"a dog",
        "._a.jpg": b"of macOS",
        "a.png": picture(4),
        "a.cls": b"3",
        "c.npy": b"",
        "d.png": picture(5),
        "d.json": b"{oops",
        "e.txt": b"a caption of nothing",
    }
    write(tmp_path / "0.tar", good | others)
    source = data.source(tmp_path / "0.tar", 16)
    assert {source[i][1] for i in range(2)} == {"one", "two"} and not source.bad
    told = capsys.readouterr().out
    for words in (
        *(
            "2 files with a dot in their name",
            "0.5_dog.jpg",
            "1 hidden files",
            "1 more pictures",
            "a.png",
            "(.cls)",
            "(.npy)",
        ),
        *("1 broken .json", "1 captions without an image", "e.txt", "1 images without a caption", "d.png"),
    ):
        assert words in told, words


def test_an_unreadable_picture_of_a_pair_is_passed_over(tmp_path, capsys):
    """By the rules of --data: named, replaced by the next pair; above 5 % the run ends."""
    rows = []
    for i in range(40):
        rows.append({"caption": f"pair {i}", "jpg_0_file_name": f"{i}.png", "jpg_1_file_name": "x.png", "label_0": 1})
    folder = in_folder(tmp_path / "pairs", {f"{i}.png": picture(i) for i in range(40)} | {"x.png": picture(99)})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "3.png").write_bytes(b"broken")
    (folder / "20.png").unlink()  # kept out of training
    pairs = Pairs(folder, 16, 0)
    drawn = [pairs[i][1] for i in range(len(pairs.rows))]
    assert len(pairs.rows) == 38 and "pair 3" not in drawn and set(pairs.bad) == {"3.png", "20.png"}
    assert [number for number, *_ in pairs.held_out()] == [0]
    assert "3.png (2 so far)" in capsys.readouterr().out
    for i in (5, 6, 7):
        (folder / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="5 of 80 images .*more than 5 %"):
        [pairs[i] for i in range(len(pairs.rows))]
