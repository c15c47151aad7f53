"""GenEval: the rules on hand-made detections, the detector's input and output, the conversion of its weights."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from engine import detector, geneval, metrics, openmmlab
from engine.errors import UserError


def seen(name, score, *box, color=None):
    box = box or (0, 0, 100, 100)
    return {"class": name, "score": score, "box": list(box)} | ({"color": color} if color else {})


def entry(tag, *include, exclude=()):
    keys = ("class", "count", "color", "position")
    include = [{k: v for k, v in zip(keys, wanted) if v is not None} for wanted in include]
    return {"tag": tag, "prompt": "...", "include": include} | ({"exclude": list(exclude)} if exclude else {})


ONE = entry("single_object", ("bench", 1))
TWO = entry("two_object", ("bench", 1), ("dog", 1))
COUNT = entry("counting", ("clock", 2), exclude=[{"class": "clock", "count": 3}])
COLOR = entry("colors", ("car", 1, "red"))
BOTH = entry("color_attr", ("wine glass", 1, "purple"), ("apple", 1, "black"))
RIGHT = entry("position", ("teddy bear", 1), ("dog", 1, None, ("right of", 0)))
BEAR = seen("teddy bear", 0.9)
CASES = {
    "one object": (ONE, [seen("bench", 0.31)], True),
    "at the threshold": (ONE, [seen("bench", 0.3)], False),
    "more objects, and others, do no harm": (ONE, [seen("bench", 0.9), seen("bench", 0.8), seen("dog", 0.9)], True),
    "two": (TWO, [seen("dog", 0.4), seen("bench", 0.5)], True),
    "one of two": (TWO, [seen("bench", 0.5)], False),
    "two clocks; below 0.9 none counts": (COUNT, [seen("clock", s) for s in (0.95, 0.91, 0.9, 0.5)], True),
    "three clocks": (COUNT, [seen("clock", s) for s in (0.95, 0.91, 0.92)], False),
    "one clock": (COUNT, [seen("clock", 0.95)], False),
    "red": (COLOR, [seen("car", 0.5, color="red")], True),
    "the best is red": (COLOR, [seen("car", 0.5, color="blue"), seen("car", 0.9, color="red")], True),
    "the best is blue": (COLOR, [seen("car", 0.9, color="blue"), seen("car", 0.5, color="red")], False),
    "bound": (BOTH, [seen("apple", 0.9, color="black"), seen("wine glass", 0.9, color="purple")], True),
    "swapped": (BOTH, [seen("apple", 0.9, color="purple"), seen("wine glass", 0.9, color="black")], False),
    "right of": (RIGHT, [BEAR, seen("dog", 0.9, 200, 0, 300, 100)], True),
    "left of": (RIGHT, [seen("teddy bear", 0.9, 200, 0, 300, 100), seen("dog", 0.9)], False),
    "offset 40 of 100: a half, not more": (RIGHT, [BEAR, seen("dog", 0.9, 40, 0, 140, 100)], False),
    "offset 41": (RIGHT, [BEAR, seen("dog", 0.9, 41, 0, 141, 100)], True),
    "right and below at once": (RIGHT, [BEAR, seen("dog", 0.9, 300, 300, 400, 400)], True),
    "one place": (RIGHT, [BEAR, seen("dog", 0.9)], False),
    "the target is missing": (RIGHT, [seen("teddy bear", 0.2), seen("dog", 0.9, 200, 0, 300, 100)], False),
    "the best dog's place alone counts": (
        RIGHT,
        [BEAR, seen("dog", 0.95, 0, 200, 100, 300), seen("dog", 0.9, 300, 0, 400, 100)],
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rules(case):
    asked, detections, right = CASES[case]
    for order in (detections, detections[::-1]):  # the score counts, not the place in the list
        assert (not geneval.mistakes(asked, order)) == right


def test_a_wrong_target_makes_its_relation_wrong():
    """The target has the wrong colour: its place is not looked at."""
    asked = entry("position", ("car", 1, "red"), ("dog", 1, None, ("right of", 0)))
    dog = seen("dog", 0.9, 200, 0, 300, 100)
    assert not geneval.mistakes(asked, [seen("car", 0.9, color="red"), dog])
    assert geneval.mistakes(asked, [seen("car", 0.9, color="blue"), dog]) == [
        "car: blue, not red",
        "dog not right of car",
    ]


def test_relations_by_another_route():
    """Random boxes against the definition in complex numbers; all eight sectors and "none" come up."""
    rng = random.Random(0)
    met = set()
    for _ in range(500):
        x, y, w, h, X, Y, W, H = (rng.randint(1, 60) for _ in range(8))
        a, b = [x, y, x + w, y + h], [X, Y, X + W, Y + H]
        d = complex(x + w / 2 - X - W / 2, y + h / 2 - Y - H / 2)
        short = [np.sign(v) * max(abs(v) - s / 10, 0) for v, s in ((d.real, w + W), (d.imag, h + H))]
        expected = set()
        if max(map(abs, short)) >= 1e-3:
            unit = np.array(short) / abs(d)
            expected = {n for n, far in zip(("left of", "right of"), (unit[0] < -0.5, unit[0] > 0.5)) if far}
            expected |= {n for n, far in zip(("above", "below"), (unit[1] < -0.5, unit[1] > 0.5)) if far}
        assert geneval.relations(a, b) == expected
        met.add(frozenset(expected))
    assert len(met) == 9


def test_what_is_looked_at():
    """At most 16 of a class; only the objects whose colour decides are coloured, and only where enough were found."""
    many = [seen("clock", 0.9 + i / 1000) for i in range(1, 21)]
    assert [d["score"] for d in geneval.counted(COUNT, many, "clock")] == [0.9 + i / 1000 for i in range(20, 4, -1)]
    cars = [seen("car", 0.5), seen("car", 0.7), seen("dog", 0.9)]
    assert geneval.to_color(COLOR, cars) == [cars[1]]
    assert geneval.to_color(entry("colors", ("car", 3, "red")), cars) == [] == geneval.to_color(ONE, cars)
    first, second = seen("dog", 0.5, 1, 1, 2, 2), seen("dog", 0.5, 3, 3, 4, 4)
    assert geneval.counted(ONE, [first, second], "dog") == [second, first]  # numpy's argsort, reversed


def test_published_numbers():
    """A published log (right pictures of all, per task) and SDXL's row: overall is the plain mean of six tasks."""
    log = {"single_object": (289, 320), "two_object": (214, 396), "counting": (120, 320)}
    log |= {"colors": (303, 376), "position": (32, 400), "color_attr": (60, 364)}
    entries, right = [], []
    for task, (good, n) in log.items():
        pictures = [i < good for i in range(n)]
        entries += [{"tag": task}] * (n // 4)
        right += [pictures[i : i + 4] for i in range(0, n, 4)]
    found = geneval.scores(entries, right)
    assert round(100 * found["geneval"], 2) == 47.82
    assert round(100 * found["geneval_pictures"], 2) == 46.78
    assert found["geneval_tasks"]["counting"] == 120 / 320
    assert found["geneval_prompts"] == np.mean([any(r) for r in right])
    for overall, *tasks in geneval.PAPER.values():
        assert abs(np.mean(tasks) - overall) < 0.011  # of rounded ones


@pytest.mark.parametrize(
    "line, why",
    [
        ('{"tag": "colors", "prompt": "p", "include": [{"class": "car", "count": 1, "color": "cyan"}]}', "cyan"),
        ('{"tag": "single_object", "prompt": "p", "include": [{"class": "unicorn", "count": 1}]}', "unicorn"),
        ('{"tag": "single_object", "include": [{"class": "car", "count": 1}]}', "prompt"),
        ('{"tag": "position", "prompt": "p", "include": [{"class": "car", "count": 1, "position": ["above", 0]}]}', ""),
        ("a photo of a bench", "line 2"),
    ],
)
def test_a_wrong_prompt_file_is_named(line, why, tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(json.dumps(ONE) + "\n" + line + "\n")
    with pytest.raises(UserError, match="line 2") as e:
        geneval.read(path)
    assert why in str(e.value)
    path.write_text(json.dumps(ONE) + "\n" + json.dumps(RIGHT) + "\n")
    assert [e["tag"] for e in geneval.read(path)] == ["single_object", "position"]


def test_input():
    """The short side to 800 unless the long one would pass 1333; grey 128 below and right, to multiples of 32."""
    for (w, h), size, padded in [
        ((64, 64), (800, 800), (800, 800)),
        ((640, 428), (800, 1196), (800, 1216)),
        ((100, 400), (1333, 333), (1344, 352)),
    ]:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8))
        pixels, found = detector.prepared(image)
        assert found == size and pixels.shape == (1, 3, *padded)
        grey = pixels[0] * torch.tensor(detector.STD).view(3, 1, 1) + torch.tensor(detector.MEAN).view(3, 1, 1)
        inside = grey[:, : size[0], : size[1]]
        assert torch.allclose(inside, inside.round(), atol=1e-3)
        assert torch.allclose(grey[:, size[0] :], torch.tensor(128.0)) and torch.allclose(
            grey[:, :, size[1] :], torch.tensor(128.0)
        )
        if (w, h) == (100, 400):  # between pixel centres by hand
            row = 1000  # its centre is (1000.5 / 3.33 - 0.5) in the picture's rows, here and below by the exact ratio
            at = (row + 0.5) * h / size[0] - 0.5
            low, part = int(at), at - int(at)
            column = np.array(image)[:, 0].astype(float)
            assert np.allclose(inside[:, row, 0], (1 - part) * column[low] + part * column[low + 1], atol=0.51)


def test_output():
    """Hand-made logits: the class and query of each detection, its box, its score; the padding is cut off."""
    classes = torch.full((2, 81), -9.0)
    classes[0, geneval.CLASSES.index("dog")] = classes[1, geneval.CLASSES.index("computer mouse")] = 5.0
    masks = torch.full((2, 8, 8), -4.0)
    masks[0, 2:5, 1:4] = 6.0  # in quarters of the padded input, 32 x 32
    masks[1, 7:] = 6.0  # in the padding alone
    found = detector.detections(classes, masks, (32, 32), (24, 32), (64, 48))
    assert len(found) == 100 and found == sorted(found, key=lambda d: -d["score"])
    dog = found[0]
    assert dog["class"] == "dog" and dog["mask"].shape == (48, 64)
    x0, y0, x1, y1 = dog["box"]
    assert abs(x0 - 8) <= 3 and abs(y0 - 16) <= 3 and abs(x1 - 32) <= 3 and abs(y1 - 40) <= 3
    rows, columns = dog["mask"].numpy().nonzero()
    assert dog["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    up = F.interpolate(masks[:1][None], (32, 32), mode="bilinear")[..., :24, :]
    up = F.interpolate(up, (48, 64), mode="bilinear")[0, 0]
    mean_inside = up[up > 0].sigmoid().mean().item()
    assert dog["score"] == pytest.approx(classes[0].softmax(-1)[16].item() * mean_inside, rel=1e-5)
    mouse = next(d for d in found if d["class"] == "computer mouse")
    assert mouse["box"] == [0, 0, 0, 0] and mouse["score"] == 0 and not mouse["mask"].any()


def test_colors():
    """Ten colours, three texts each; the picture is grey outside the mask, cut to the box, not squashed."""
    clip = metrics.Clip("toy/clip")
    colors = detector.Colors(clip)
    texts = [f"a photo of a green{rest}" for rest in (" car", "-colored car", " object")]
    mean = F.normalize(clip.embed_text(texts), dim=-1).mean(0)
    assert torch.allclose(colors.of("car")[3], F.normalize(mean, dim=0), atol=1e-6)
    image = Image.new("RGB", (50, 40), "red")
    mask = torch.zeros(40, 50, dtype=torch.bool)
    mask[10:20, 5:45] = True
    mask[12, 20] = False
    cut = detector.cut_out(image, {"mask": mask, "box": [5, 10, 45, 20]})
    assert cut.size == (40, 10) and cut.getpixel((0, 0)) == (255, 0, 0) and cut.getpixel((15, 2)) == (153, 153, 153)
    side = clip.model.config.vision_config.image_size
    pixels = colors.transform(cut, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, side, side)
    assert colors(image, {"class": "car", "mask": mask, "box": [5, 10, 45, 20]}) in geneval.COLORS
    scores = colors.of("car") @ clip.embed(pixels)[0]  # the nearest of ten
    assert colors(image, {"class": "car", "mask": mask, "box": [5, 10, 45, 20]}) == geneval.COLORS[scores.argmax()]


def theirs(net):
    """The state dict of a network under OpenMMLab's names, written down from its modules' own structure."""
    state = {}

    def put(name, module, **parts):
        for part, value in module.state_dict().items():
            state[f"{name}.{parts.get(part, part)}"] = value.clone()

    swin = net.model.pixel_level_module.encoder.swin
    put("backbone.patch_embed.projection", swin.embeddings.patch_embeddings.projection)
    put("backbone.patch_embed.norm", swin.embeddings.norm)
    for i, stage in enumerate(swin.encoder.layers):
        for j, block in enumerate(stage.blocks):
            at, a = f"backbone.stages.{i}.blocks.{j}", block.attention
            put(f"{at}.norm1", block.layernorm_before)
            put(f"{at}.norm2", block.layernorm_after)
            put(f"{at}.attn.w_msa.proj", a.o_proj)
            put(f"{at}.ffn.layers.0.0", block.mlp.fc1)
            put(f"{at}.ffn.layers.1", block.mlp.fc2)
            for part in ("weight", "bias"):
                qkv = torch.cat([getattr(layer, part) for layer in (a.q_proj, a.k_proj, a.v_proj)])
                state[f"{at}.attn.w_msa.qkv.{part}"] = qkv.detach()
            table = a.relative_position_bias.relative_position_bias_table
            state[f"{at}.attn.w_msa.relative_position_bias_table"] = table.detach()
            state[f"{at}.attn.w_msa.relative_position_index"] = torch.zeros(16, 16)
        if stage.downsample is not None:
            at = f"backbone.stages.{i}.downsample"
            for name, value in (("norm.weight", 0), ("norm.bias", 0), ("reduction.weight", 0)):
                value = stage.downsample.state_dict()[name]
                blocks = value.unflatten(-1, (2, 2, -1))  # column, row, channel
                state[f"{at}.{name}"] = blocks.movedim(-1, -3).transpose(-1, -2).flatten(-3)  # channel, row, column
    for k, norm in enumerate(net.model.pixel_level_module.encoder.hidden_states_norms.values()):
        put(f"backbone.norm{k}", norm)
    pixels = net.model.pixel_level_module.decoder
    for i, (conv, norm) in enumerate(pixels.input_projections):
        put(f"panoptic_head.pixel_decoder.input_convs.{i}.conv", conv)
        put(f"panoptic_head.pixel_decoder.input_convs.{i}.gn", norm)
    for name, pair in (("lateral_convs", pixels.adapter_1), ("output_convs", pixels.layer_1)):
        put(f"panoptic_head.pixel_decoder.{name}.0.conv", pair[0])
        put(f"panoptic_head.pixel_decoder.{name}.0.gn", pair[1])
    put("panoptic_head.pixel_decoder.mask_feature", pixels.mask_projection)
    state["panoptic_head.pixel_decoder.level_encoding.weight"] = pixels.level_embed.detach()
    for i, layer in enumerate(pixels.encoder.layers):
        at = f"panoptic_head.pixel_decoder.encoder.layers.{i}"
        put(f"{at}.attentions.0", layer.self_attn)
        put(f"{at}.norms.0", layer.self_attn_layer_norm)
        put(f"{at}.norms.1", layer.final_layer_norm)
        put(f"{at}.ffns.0.layers.0.0", layer.fc1)
        put(f"{at}.ffns.0.layers.1", layer.fc2)
    head = net.model.transformer_module
    for i, layer in enumerate(head.decoder.layers):
        at, a = f"panoptic_head.transformer_decoder.layers.{i}", layer.self_attn
        put(f"{at}.attentions.0.attn", layer.cross_attn)
        put(f"{at}.attentions.1.attn.out_proj", a.out_proj)
        for part in ("weight", "bias"):
            joint = torch.cat([getattr(projection, part) for projection in (a.q_proj, a.k_proj, a.v_proj)])
            state[f"{at}.attentions.1.attn.in_proj_{part}"] = joint.detach()
        norms = (layer.cross_attn_layer_norm, layer.self_attn_layer_norm, layer.final_layer_norm)
        for k, norm in enumerate(norms):
            put(f"{at}.norms.{k}", norm)
        put(f"{at}.ffns.0.layers.0.0", layer.fc1)
        put(f"{at}.ffns.0.layers.1", layer.fc2)
    put("panoptic_head.transformer_decoder.post_norm", head.decoder.layernorm)
    put("panoptic_head.query_embed", head.queries_embedder)
    put("panoptic_head.query_feat", head.queries_features)
    put("panoptic_head.level_embed", head.level_embed)
    for i, part in enumerate(head.decoder.mask_predictor.mask_embedder.children()):
        put(f"panoptic_head.mask_embed.{2 * i}", next(part.children()))
    put("panoptic_head.cls_embed", net.class_predictor)
    return state


def test_conversion(mask2former, tmp_path):
    """OpenMMLab's names and layouts give the same network to the bit; its merging of 2 x 2 patches is an unfolding."""
    folder, net = mask2former
    path = tmp_path / "theirs.pth"
    torch.save({"meta": {"epoch": 50, "CLASSES": ("person",)}, "state_dict": theirs(net)}, path)
    found = openmmlab.converted(path)
    expected = {k: v for k, v in net.state_dict().items() if k not in openmmlab.UNSET}
    assert all(torch.equal(found.state_dict()[k], v) for k, v in expected.items())
    assert found.config.num_attention_heads == 4 and found.config.backbone_config.window_size == 4
    merging = net.model.pixel_level_module.encoder.swin.encoder.layers[0].downsample
    weights = theirs(net)
    at = "backbone.stages.0.downsample"
    x = torch.randn(1, 8, 8, 6)  # (N, C, H, W)
    unfolded = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # as their code has it
    scale, shift, matrix = (weights[f"{at}.{part}"] for part in ("norm.weight", "norm.bias", "reduction.weight"))
    reduced = F.layer_norm(unfolded, (32,), scale, shift) @ matrix.T
    assert torch.allclose(merging(x.permute(0, 2, 3, 1).flatten(1, 2), (8, 6)), reduced, atol=1e-5)


def test_a_wrong_detector_is_named(mask2former, tmp_path):
    folder, net = mask2former
    state = theirs(net)
    for name, change in [
        ("no Swin", lambda s: s.pop("backbone.patch_embed.projection.weight")),
        ("one layer is missing", lambda s: s.pop("panoptic_head.pixel_decoder.mask_feature.bias")),
        ("one too many", lambda s: s.update({"bbox_head.weight": torch.zeros(1)})),
    ]:
        broken = dict(state)
        change(broken)
        torch.save({"state_dict": broken}, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=f"{name}.pth"):
            openmmlab.converted(tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match="clip"):
        detector.Detector("toy/clip")


def test_detector_on_a_picture(mask2former):
    """From a folder: the detections are those of the network's own output."""
    folder, net = mask2former
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    found = detector.Detector(str(folder))(image)
    pixels, size = detector.prepared(image)
    with torch.no_grad():
        out = net(pixel_values=pixels)
    args = (out.class_queries_logits[0], out.masks_queries_logits[0], pixels.shape[-2:], size, (60, 40))
    for a, b in zip(found, detector.detections(*args), strict=True):
        assert a["class"] == b["class"] and a["box"] == b["box"] and torch.equal(a["mask"], b["mask"])
        assert a["score"] == b["score"]
