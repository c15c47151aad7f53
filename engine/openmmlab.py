"""OpenMMLab's checkpoint of Mask2Former (GenEval's own detector) -> transformers' class, by a table of names."""

import re
from pathlib import Path

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from engine.errors import UserError
from engine.folders import first_line

ENCODER = "model.pixel_level_module.encoder."
PIXELS = "model.pixel_level_module.decoder."
DECODER = "model.transformer_module.decoder."
NAMES = [  # theirs (a whole match, with what follows it) -> ours
    (r"backbone\.patch_embed\.projection", ENCODER + "swin.embeddings.patch_embeddings.projection"),
    (r"backbone\.patch_embed\.norm", ENCODER + "swin.embeddings.norm"),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)", ENCODER + r"swin.encoder.layers.\1.blocks.\2"),
    (r"backbone\.stages\.(\d+)\.downsample", ENCODER + r"swin.encoder.layers.\1.downsample"),
    *[(rf"backbone\.norm{k}", f"{ENCODER}hidden_states_norms.stage{k + 1}") for k in range(4)],
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv", PIXELS + r"input_projections.\1.0"),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn", PIXELS + r"input_projections.\1.1"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv", PIXELS + "adapter_1.0"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn", PIXELS + "adapter_1.1"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv", PIXELS + "layer_1.0"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn", PIXELS + "layer_1.1"),
    (r"panoptic_head\.pixel_decoder\.mask_feature", PIXELS + "mask_projection"),
    (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", PIXELS + "level_embed"),
    (r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)", PIXELS + r"encoder.layers.\1"),
    (r"panoptic_head\.transformer_decoder\.layers\.(\d+)", DECODER + r"layers.\1"),
    (r"panoptic_head\.transformer_decoder\.post_norm", DECODER + "layernorm"),
    (r"panoptic_head\.query_embed", "model.transformer_module.queries_embedder"),
    (r"panoptic_head\.query_feat", "model.transformer_module.queries_features"),
    (r"panoptic_head\.level_embed", "model.transformer_module.level_embed"),
    *[(rf"panoptic_head\.mask_embed\.{2 * i}", f"{DECODER}mask_predictor.mask_embedder.{i}.0") for i in range(3)],
    (r"panoptic_head\.cls_embed", "class_predictor"),
]
INSIDE = {  # parts of a block or layer, by the block's prefix in our names
    ENCODER: {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.w_msa.relative_position_bias_table": "attention.relative_position_bias.relative_position_bias_table",
        "attn.w_msa.proj": "attention.o_proj",
        "ffn.layers.0.0": "mlp.fc1",
        "ffn.layers.1": "mlp.fc2",
    },
    PIXELS: {
        "attentions.0": "self_attn",
        "norms.0": "self_attn_layer_norm",
        "norms.1": "final_layer_norm",
        "ffns.0.layers.0.0": "fc1",
        "ffns.0.layers.1": "fc2",
    },
    DECODER: {
        "attentions.0.attn": "cross_attn",
        "attentions.1.attn": "self_attn",
        "norms.0": "cross_attn_layer_norm",
        "norms.1": "self_attn_layer_norm",
        "norms.2": "final_layer_norm",
        "ffns.0.layers.0.0": "fc1",
        "ffns.0.layers.1": "fc2",
    },
}
UNSET = {f"{ENCODER}swin.layernorm.weight", f"{ENCODER}swin.layernorm.bias", "criterion.empty_weight"}  # and unused
LEVELS_POINTS = 3 * 4  # of deformable attention


def converted(path):
    """The checkpoint's network. Raises UserError for a file that is none, or lacks a weight."""
    if not Path(path).is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        theirs = content.get("state_dict", content)
        model = Mask2FormerForUniversalSegmentation(config_of(theirs))
        ours = renamed(theirs)
    except Exception as e:  # torch.load's, and a missing or misshapen weight
        why = f"it lacks {e}" if isinstance(e, KeyError) else first_line(e)
        raise UserError(f"cannot read {path} as OpenMMLab's Mask2Former with a Swin backbone: {why}") from None
    expected = {k: v.shape for k, v in model.state_dict().items() if k not in UNSET}
    wrong = [k for k in expected.keys() | ours.keys() if k not in expected or ours.get(k, _NONE).shape != expected[k]]
    if wrong:
        raise UserError(f"{path} does not fit OpenMMLab's Mask2Former with a Swin backbone, first in {min(wrong)}")
    model.load_state_dict(ours, strict=False)
    return model


_NONE = torch.empty(0, 0, 0)


def config_of(theirs):
    """The network's sizes, read off the shapes of its weights -> Mask2FormerConfig."""
    count = lambda pattern: 1 + max(int(m[1]) for m in (re.match(pattern, k) for k in theirs) if m)  # noqa: E731
    tables = [
        theirs[f"backbone.stages.{i}.blocks.0.attn.w_msa.relative_position_bias_table"].shape
        for i in range(count(r"backbone\.stages\.(\d+)\."))
    ]
    head, pixels = "panoptic_head.", "panoptic_head.pixel_decoder."
    layer = f"{pixels}encoder.layers.0."
    backbone = SwinConfig(
        embed_dim=len(theirs["backbone.patch_embed.projection.weight"]),
        depths=[count(rf"backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in range(len(tables))],
        num_heads=[heads for _, heads in tables],
        window_size=(int(tables[0][0] ** 0.5) + 1) // 2,
        out_features=[f"stage{i + 1}" for i in range(len(tables))],
    )
    queries, hidden = theirs[f"{head}query_embed.weight"].shape
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=len(theirs[f"{pixels}input_convs.0.conv.weight"]),
        mask_feature_size=len(theirs[f"{pixels}mask_feature.weight"]),
        hidden_dim=hidden,
        num_queries=queries,
        num_labels=len(theirs[f"{head}cls_embed.weight"]) - 1,
        encoder_layers=count(r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\."),
        decoder_layers=1 + count(r"panoptic_head\.transformer_decoder\.layers\.(\d+)\."),  # transformers counts so
        encoder_feedforward_dim=len(theirs[f"{layer}ffns.0.layers.0.0.weight"]),
        dim_feedforward=len(theirs[f"{head}transformer_decoder.layers.0.ffns.0.layers.0.0.weight"]),
        num_attention_heads=len(theirs[f"{layer}attentions.0.attention_weights.weight"]) // LEVELS_POINTS,
    )


def renamed(theirs):
    """Their state dict -> ours. Raises KeyError for a name that is in no table."""
    ours = {}
    for name, value in theirs.items():
        if name.endswith("relative_position_index"):
            continue
        matches = ((re.match(rf"{theirs}(?=\.|$)", name), new) for theirs, new in NAMES)
        match, new = next(((match, new) for match, new in matches if match), (None, ""))
        if not match:
            raise KeyError(name)
        prefix, rest = match.expand(new), name[match.end() :].lstrip(".")
        for key, part in parts(prefix, rest, value):
            ours[key] = part
    return ours


def parts(prefix, rest, value):
    """A weight -> [(our name, weight)]: one, or three of a joint projection."""
    table = next((table for start, table in INSIDE.items() if prefix.startswith(start) and ".layers." in prefix), {})
    for theirs, ours in table.items():
        if rest == theirs or rest.startswith((theirs + ".", theirs + ".in_proj")):
            rest = ours + rest[len(theirs) :]
            break
    if ".attn.w_msa.qkv." in f".{rest}":
        names = [f"attention.{x}_proj.{rest.rsplit('.', 1)[1]}" for x in "qkv"]
        return [(f"{prefix}.{new}", part) for new, part in zip(names, value.chunk(3))]
    if rest.startswith("self_attn.in_proj_"):
        names = [f"self_attn.{x}_proj.{rest.removeprefix('self_attn.in_proj_')}" for x in "qkv"]
        return [(f"{prefix}.{new}", part) for new, part in zip(names, value.chunk(3))]
    if prefix.endswith("downsample"):
        # theirs (C, 2 x 2 in rows), ours (2 x 2 in columns, C)
        value = value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)
    return [(f"{prefix}.{rest}" if rest else prefix, value)]
