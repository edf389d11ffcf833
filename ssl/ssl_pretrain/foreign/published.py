"""Reads checkpoints as published by their authors into our ViT: MAE, BEiT, I-JEPA, DINO, iBOT, DINOv2, DINOv3, MoCo v3,
AIM, AIMv2, data2vec 2.0, and the versions of timm and transformers. Other encoders: published_swin.py, published_hiera.py,
published_convnets.py.

Shapes: D channels, N patches on a square (h, h) grid in raster order, P prefix tokens, p patch side.

A file does not state its layout. The layout is detected from the name of the patch embedding's weight, which every
layout has; the prefix of that name gives the position of the encoder in the file. The rest is renaming, and it is
strict: a name that belongs neither to the encoder nor to a head, decoder or second network is an error, and so is a
missing name.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backbones
from ..backbones.positions import ROPE_BASE, Offsets, resize_offsets, resize_table, sincos_table
from ..encoder import Encoder, Preprocessing
from ..errors import UserError, nearest
from . import published_convnets, published_hiera, published_swin
from .weights import SHOWN, difference, flat, read_file

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of all layouts except BEiT's and AIMv2's
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # BEiT's; BEiT v2 has ImageNet's again
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # AIMv2's
LAYOUTS = (
    *("mae", "beit", "ijepa", "dino", "ibot", "dinov2", "dinov3", "mocov3", "aim", "aimv2", "data2vec2", "hiera"),
    "transformers",
)

# The weight of the patch embedding, from which a layout is detected.
COMMON = "patch_embed.proj.weight"
AIM = "preprocessor.patchifier.proj.weight"
DATA2VEC = "modality_encoders.IMAGE.local_encoder.proj.weight"
TRANSFORMERS = (
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embed.weight",
)
TABLE = "relative_position_bias_table"  # BEiT's, one for each block or one for all
# If a file has several encoders, the one that its authors evaluate: the first of these in the part's name.
PREFERRED = (
    "target_encoder",
    "teacher",
    "model_ema",
    "base_encoder",
    "momentum_encoder",
    "student",
    "encoder",
    "model",
)

# In the encoder's part, but not of the encoder: heads, decoders, tokens and tables that only pretraining uses.
BESIDE = re.compile(
    r"(mask_token$|masked_embed$|head\.|head_drop|fc\.|decoder|predictor|lm_head|pooler\.|classifier\.|local_cls_norm\."
    r"|rope_embed\.|rope_embeddings\.|embeddings\.mask_token$|modality_encoders\.IMAGE\.decoder|_ema\.|dino_head|ibot_head"
    r"|recon_proj|cls_proj|regression_head|cls_pt_layers\.)"
)
WRAPPED = re.compile(r"_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")  # prefixes that torch adds
RENAMED = {
    COMMON: [
        (r"^(register_tokens|storage_tokens|reg_token)$", "reg_tokens"),
        (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),  # DINOv2's training checkpoints: blocks.CHUNK.BLOCK
        (r"^patch_embed\.norm\.", "norm_pre."),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"\.mlp\.(w1|fc1_g)\.", ".mlp.gate."),
        (r"\.mlp\.(w2|fc1_x)\.", ".mlp.up."),
    ],
    AIM: [
        (r"^preprocessor\.patchifier\.proj\.", "patch_embed.proj."),
        (r"^preprocessor\.patchifier\.norm\.", "norm_pre."),
        (r"^preprocessor\.pos_embed$", "pos_embed"),
        (r"^trunk\.post_trunk_norm\.", "norm."),
        (r"^trunk\.", ""),
        (r"\.norm_([12])\.", r".norm\1."),
    ],
    DATA2VEC: [
        (r"^modality_encoders\.IMAGE\.local_encoder\.proj\.", "patch_embed.proj."),
        (r"^modality_encoders\.IMAGE\.extra_tokens$", "cls_token"),
        (r"^modality_encoders\.IMAGE\.fixed_positional_encoder\.positions$", "pos_embed"),
        (r"^modality_encoders\.IMAGE\.context_encoder\.norm\.", "norm_pre."),
    ],
    "transformers": [
        (r"^embeddings\.(patch_embeddings\.(projection\.)?|patch_embed\.)", "patch_embed.proj."),
        (r"^embeddings\.rms_norm\.", "norm_pre."),
        (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
        (r"^embeddings\.register_tokens$", "reg_tokens"),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^(encoder\.|model\.)?layers?\.", "blocks."),
        (r"^(layernorm|rms_norm)\.", "norm."),
        (r"\.rms_norm([12])\.", r".norm\1."),
        (r"\.ffn\.", ".mlp."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
        (r"\.attention\.(output\.dense|o_proj|out_proj)\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.lambda_([12])$", r".ls\1.gamma"),
        (r"\.(attention\.(attention\.)?)?relative_position_bias\." + TABLE, ".attn." + TABLE),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.gate_proj\.", ".mlp.gate."),
        (r"\.mlp\.up_proj\.", ".mlp.up."),
        (r"\.mlp\.down_proj\.", ".mlp.down."),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.weights_out\.", ".mlp.w3."),
    ],
}


def read(
    file: Path,
    *,
    layout: str | None = None,
    heads: int | None = None,
    part: str | None = None,
    image_size: tuple[int, int] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> Encoder:
    """Read the encoder of a published checkpoint (torch or safetensors) as our ViT (or Swin, Hiera, ResNet, ConvNeXt) in
    eval mode; `encoder.save` exports it.

    layout: one of LAYOUTS, if it cannot be detected. heads: number of attention heads, which no weight's shape shows;
    by default that of the published model of this layout and width. part: the encoder to read if the file has several
    (its name, or a word of it: "student", "momentum_encoder"); by default the one that its authors evaluate.
    image_size: (height, width) to resize the position table for, by the layout's own rule; by default the training
    size, and 224 for DINOv2. weights: the file's content, if another library has read it already. facts: what weights do
    not show, under transformers' names (`num_attention_heads`, `layer_norm_eps`); by default those of the config.json
    beside a file of transformers. partial: names that do not fit are left out; `lineage["unfit"]` says which, and
    `lineage["missing"]` lists the encoder's weights that the file lacks, whose values are random.

    `lineage` names the layout, the part and what was left out. Raises UserError for a file that cannot be read without
    unpickling, an architecture that our ViT does not support, and weights that do not match it name for name, with the
    difference.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}{nearest(layout, LAYOUTS)}")
    content = flat(read_file(file)) if weights is None else weights
    everything = {WRAPPED.sub("", name): value for name, value in content.items()}
    if layout is None and (convnet := published_convnets.find(everything, part)) is not None:
        stated = transformers_preprocessing(file.parent) if convnet[0] == "transformers" else None
        return published_convnets.read(everything, convnet, file, image_size=image_size, stated=stated, partial=partial)
    prefix, anchor = _part(everything, part, file)
    inside = {name.removeprefix(prefix): value for name, value in everything.items() if name.startswith(prefix)}
    if published_swin.is_swin(inside):
        beside = facts or (_config(file) if anchor in TRANSFORMERS else {})
        found = published_swin.read(inside, beside, file)
        method = str(beside.get("model_type", "swin")) if anchor in TRANSFORMERS else "swin"
        made = _Made(found.name, "Swin", found.options, found.weights, image_size or found.size, found.left_out)
        return _encoder(made, method, IMAGENET, prefix, len(everything) - len(inside), anchor, file, partial)
    if anchor == COMMON and published_hiera.fits(inside):
        backbone, name, facts_of_file = published_hiera.read(inside, heads, image_size, file)
        lineage = {**facts_of_file, "weights": str(file), "part": prefix.rstrip(".") or "all"}
        lineage["left_out_of_other_parts"] = len(everything) - len(inside)
        return Encoder(backbone, name, Preprocessing.for_size(backbone.image_size, *IMAGENET), lineage).eval()
    _refuse_other_architectures(inside, anchor, file)
    extra = [n for n in inside if BESIDE.match(n) or n.endswith((".bias_mask", "relative_position_index"))]
    renamed = _renamed({name: value for name, value in inside.items() if name not in extra}, anchor)
    weights = _in_our_form(renamed, inside, anchor)

    beside = facts or (_config(file) if anchor in TRANSFORMERS else {})
    layout = layout or _layout(weights, inside, prefix, anchor)
    options = _architecture(weights, layout, heads or _heads(weights, inside, layout, beside, file), beside)
    native, size = _image_size(weights, options, layout, image_size, file)
    _positions(weights, options, layout, native, size)
    first_beit = layout == "beit" and not any(name.startswith("cls_pt_layers.") for name in inside)
    usual = HALF if first_beit else CLIP if options["rms_norm"] else IMAGENET
    method = beside.get("model_type", "unknown") if layout == "transformers" else layout
    made = _Made(_name(options), f"ViT ({_describe(options)})", options, weights, size, extra)
    return _encoder(made, method, usual, prefix, len(everything) - len(inside), anchor, file, partial)


@dataclass(frozen=True)
class _Made:
    """A file in our terms."""

    name: str  # of the encoder
    what: str  # for messages
    options: Mapping[str, Any]
    weights: Mapping[str, Tensor]  # under our names
    size: tuple[int, int]  # of the images
    left_out: list[str]  # names in the file


def _encoder(
    made: _Made,
    method: str,
    usual: tuple[tuple[float, ...], tuple[float, ...]],
    prefix: str,
    others: int,
    anchor: str,
    file: Path,
    partial: bool,
) -> Encoder:
    """The encoder, with the file's weights, in eval mode. usual: mean and std where the file states none. others: the
    number of weights outside the encoder's part."""
    with torch.random.fork_rng(devices=[]):
        backbone = backbones.build(made.name, image_size=made.size, **made.options)
    own = backbone.state_dict()
    problem = difference(own, made.weights)
    if problem and not partial:
        raise UserError(f"{file} does not fit a {made.what}: {problem}")
    fitting = {name: value for name, value in made.weights.items() if name in own and value.shape == own[name].shape}
    backbone.load_state_dict(own | fitting)

    lineage = {
        "method": method,
        "weights": str(file),
        "part": prefix.rstrip(".") or "all",
        "left_out": sorted({re.sub(r"\.\d+\.", ".*.", name) for name in made.left_out}),
        "left_out_of_other_parts": others,
    }
    if problem:
        lineage |= {"unfit": problem, "missing": sorted(own.keys() - fitting.keys())}
    stated = transformers_preprocessing(file.parent) if anchor in TRANSFORMERS else None
    if stated is not None:
        lineage["preprocessing"] = "as transformers' preprocessor_config.json states"
    preprocessing = stated or Preprocessing.for_size(made.size, *usual)
    return Encoder(backbone, made.name, preprocessing, lineage).eval()


def transformers_preprocessing(folder: Path) -> Preprocessing | None:
    """The preprocessing of the image processor in a folder of transformers; None without one. Raises UserError for
    steps that `Preprocessing` cannot express.

    If the processor resizes images to a size without keeping their proportions, this is the central crop of that size
    instead, which is the same for square images.
    """
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        size = settings.get("size", 224)
        crop = settings.get("crop_size") if settings.get("do_center_crop") else None
        short = size if isinstance(size, int) else size.get("shortest_edge") or min(size["height"], size["width"])
        crop = crop or size
        if not isinstance(crop, int):
            crop = (crop["height"], crop["width"]) if "height" in crop else crop["shortest_edge"]
        crop = (crop, crop) if isinstance(crop, int) else crop
        resample: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them
        interpolation = resample[settings.get("resample", 2)]
        mean, std = tuple(map(float, settings["image_mean"])), tuple(map(float, settings["image_std"]))
        plain = settings.get("do_normalize", True) and math.isclose(
            settings.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3
        )
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file} states no preprocessing that is supported: {problem!r}") from None
    if not plain:
        raise UserError(f"{file} does not normalise images from [0, 1], which is the only supported preprocessing")
    return Preprocessing(short, crop, interpolation, mean, std)


# ---- Position and architecture of the encoder.


def _part(weights: Mapping[str, Tensor], wanted: str | None, file: Path) -> tuple[str, str]:
    """The prefix of the encoder's names in the file, and the anchor found there."""
    anchors = (COMMON, AIM, DATA2VEC, *TRANSFORMERS)
    ends = {name: anchor for anchor in anchors for name in weights if name == anchor or name.endswith(f".{anchor}")}
    places = {name.removesuffix(anchor): anchor for name, anchor in ends.items()}
    if not places:
        shown = ", ".join(list(weights)[:SHOWN])
        raise UserError(
            f"{file} has no patch embedding of a known layout ({', '.join(anchors)}); "
            f"its first names: {shown or 'none'}"
        )
    listed = ", ".join(prefix.rstrip(".") or "the top" for prefix in places)
    if wanted is not None:
        found = [prefix for prefix in places if wanted in (*prefix.split("."), prefix.rstrip("."))]
        if len(found) != 1:
            raise UserError(f"{file} has {len(found)} encoders called {wanted!r}; it has: {listed}")
        return found[0], places[found[0]]
    if len(places) == 1:
        return next(iter(places.items()))
    for word in PREFERRED:
        found = [prefix for prefix in places if word in prefix.split(".")]
        if len(found) == 1:
            return found[0], places[found[0]]
    raise UserError(f"{file} has several encoders ({listed}): choose one with ,part=")


def _refuse_other_architectures(inside: Mapping[str, Tensor], anchor: str, file: Path) -> None:
    """Raise UserError for an architecture that our ViT does not support, with a description."""
    patch = inside[anchor]
    if any("relative_position" in name for name in inside) and any("fc_norm." in name for name in inside):
        what = "BEiT's norm after the mean of the patches (fc_norm), which its fine-tuned models have"
        remedy = ": take the original model, hf:FOLDER or timm:beit_base_patch16_224,checkpoint=FILE"
    elif patch.ndim == 5:
        what, remedy = "patches of video (a 3-D patch embedding)", ""
    elif patch.ndim != 4 or patch.shape[2] != patch.shape[3]:
        what, remedy = f"a patch embedding of shape {tuple(patch.shape)}", ", whose patches are square"
    else:
        return
    raise UserError(f"{file} has {what}, and our ViT has not{remedy}")


def _layout(weights: Mapping[str, Tensor], inside: Mapping[str, Tensor], prefix: str, anchor: str) -> str:
    """The method of a layout; the oldest one if methods differ only in training."""
    if anchor in (AIM, COMMON) and "norm_pre.weight" in weights and _is_rms(weights):
        return "aimv2"
    if anchor != COMMON:
        return {AIM: "aim", DATA2VEC: "data2vec2"}.get(anchor, "transformers")
    if any(name.endswith(TABLE) for name in weights):
        return "beit"
    if "pos_embed" not in weights:
        return "dinov3"
    if "cls_token" not in weights:
        return "ijepa"
    fixed = _fixed(weights["pos_embed"], 1)
    if fixed == "row first" or "base_encoder" in prefix or "momentum_encoder" in prefix:
        return "mocov3"
    if fixed == "column first" or any(name.startswith("decoder") for name in inside):
        return "mae"
    if "reg_tokens" in weights or any(name.endswith(".ls1.gamma") for name in inside):
        return "dinov2"
    return "ibot" if "masked_embed" in inside else "dino"


# ---- Names and shapes.


def _renamed(inside: Mapping[str, Tensor], anchor: str) -> dict[str, Tensor]:
    """The encoder's weights, float32, with names converted to ours where possible."""
    rules = RENAMED["transformers" if anchor in TRANSFORMERS else anchor]
    prenet = 0
    if anchor == DATA2VEC:  # first the modality's own blocks, then the shared ones
        place = r"^modality_encoders\.IMAGE\.context_encoder\.blocks\.(\d+)\."
        prenet = 1 + max((int(m[1]) for name in inside if (m := re.match(place, name))), default=-1)
    renamed = {}
    for name, value in inside.items():
        new = name
        if anchor == DATA2VEC and (found := re.match(r"blocks\.(\d+)\.", name)):
            new = f"blocks.{int(found[1]) + prenet}.{name[found.end() :]}"
        new = re.sub(r"^modality_encoders\.IMAGE\.context_encoder\.blocks\.", "blocks.", new)
        if anchor == AIM and new.replace(".fc1.", ".fc3.") in inside:  # AIMv2: a gated MLP, and fc3 is its other half
            new = new.replace(".mlp.fc1.", ".mlp.gate.")
        new = new.replace(".mlp.fc3.", ".mlp.up.") if anchor == AIM else new
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        renamed[new] = value.float() if value.is_floating_point() else value
    return renamed


def _in_our_form(weights: dict[str, Tensor], inside: Mapping[str, Tensor], anchor: str) -> dict[str, Tensor]:
    """Merge separate matrices, add zero biases where a layout has none, and convert tables to our shape."""
    for name in [name for name in weights if name.endswith(TABLE) and not name.startswith("blocks.")]:
        shared = weights.pop(name)  # as in BEiT's fine-tuning
        weights |= {f"blocks.{i}.attn.{TABLE}": shared.clone() for i in _blocks(weights)}
    for i in _blocks(weights):
        attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
        _fuse_attention(weights, attn)
        _fuse_mlp(weights, mlp)
        mask = inside.get(f"{attn}.qkv.bias_mask")  # DINOv3: keys have no bias, but an entry for it
        if mask is not None and f"{attn}.qkv.bias" in weights:
            weights[f"{attn}.qkv.bias"] = weights[f"{attn}.qkv.bias"] * mask.float()
        if anchor == AIM or _is_rms(weights):  # no biases
            for layer in (f"{attn}.proj", *(f"{mlp}.{part}" for part in ("fc1", "fc2", "w12", "w3"))):
                if f"{layer}.weight" in weights:
                    weights.setdefault(f"{layer}.bias", torch.zeros(len(weights[f"{layer}.weight"])))
    if "pos_embed" in weights and weights["pos_embed"].ndim == 2:  # AIMv2 in transformers
        weights["pos_embed"] = weights["pos_embed"][None]
    if "cls_token" in weights and "pos_embed" in weights and _side(weights["pos_embed"].shape[1]):
        # Only patches have positions, the class token has none (data2vec 2.0, and timm with registers).
        weights["pos_embed"] = F.pad(weights["pos_embed"], (0, 0, 1, 0))
    return weights


def _fuse_attention(weights: dict[str, Tensor], attn: str) -> None:
    """Merge queries, keys and values into one matrix; keys without a bias get a zero bias."""
    if f"{attn}.q_bias" in weights:  # as in BEiT and timm
        q, v = weights.pop(f"{attn}.q_bias"), weights.pop(f"{attn}.v_bias")
        weights[f"{attn}.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    for kind in ("weight", "bias"):
        apart = {part: weights.pop(f"{attn}.{part}.{kind}") for part in "qkv" if f"{attn}.{part}.{kind}" in weights}
        if apart.keys() == {"q", "v"} and kind == "bias":
            apart["k"] = torch.zeros_like(apart["q"])
        if len(apart) == 3:
            weights[f"{attn}.qkv.{kind}"] = torch.cat([apart[part] for part in "qkv"])
        else:  # incomplete sets stay, and the check of names reports them
            weights |= {f"{attn}.{part}.{kind}": value for part, value in apart.items()}


def _fuse_mlp(weights: dict[str, Tensor], mlp: str) -> None:
    """Merge the gate and the other half of a gated MLP into one matrix w12; convert transformers' names of a plain
    MLP."""
    for kind in ("weight", "bias"):
        names = {part: f"{mlp}.{part}.{kind}" for part in ("gate", "up", "down", "fc1", "fc2", "w12", "w3")}
        gated = names["gate"] in weights and names["up"] in weights
        if gated:
            weights[names["w12"]] = torch.cat([weights.pop(names["gate"]), weights.pop(names["up"])])
        renamed = {"down": "w3", "fc2": "w3"} if gated else {"up": "fc1", "down": "fc2"}
        for theirs, ours in renamed.items():
            if names[theirs] in weights:
                weights[names[ours]] = weights.pop(names[theirs])
    fc1, fc2 = weights.get(f"{mlp}.fc1.weight"), weights.get(f"{mlp}.fc2.weight")
    if fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]:  # timm's gated MLP
        for theirs, ours in (("fc1", "w12"), ("fc2", "w3")):
            for name in [name for name in weights if name.startswith(f"{mlp}.{theirs}.")]:
                weights[name.replace(f".{theirs}.", f".{ours}.")] = weights.pop(name)


def _is_rms(weights: Mapping[str, Tensor]) -> bool:
    """Whether the norms are RMS norms, which have no bias."""
    return "blocks.0.norm1.weight" in weights and not any(re.search(r"norm[12]?\.bias$", name) for name in weights)


def _blocks(weights: Mapping[str, Tensor]) -> list[str]:
    """The numbers of the blocks."""
    return sorted({name.split(".")[1] for name in weights if re.match(r"blocks\.\d+\.", name)}, key=int)


# ---- Sizes.


def _architecture(weights: Mapping[str, Tensor], layout: str, heads: int, beside: Mapping[str, Any]) -> dict[str, Any]:
    """The ViT's options, from shapes."""
    dim, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    gated = weights.get("blocks.0.mlp.w3.weight")
    plain = weights.get("blocks.0.mlp.fc1.weight")
    hidden = gated.shape[1] * 1.5 if gated is not None else len(plain) if plain is not None else 4 * dim
    ratio = hidden / dim
    if int(ratio * dim) < int(hidden):
        ratio = math.nextafter(ratio, math.inf)
    tokens = int("cls_token" in weights)
    table = weights.get("pos_embed")
    positions = "learned"
    if f"blocks.0.attn.{TABLE}" in weights:
        positions = "relative"
    elif table is None and "norm_pre.weight" in weights:
        positions = "sincos"
    elif table is None:
        positions = "rope"
    elif _fixed(table, tokens):
        positions = "sincos"
    rms = _is_rms(weights)
    eps = beside.get("rms_norm_eps" if rms else "layer_norm_eps", 1e-5 if positions == "rope" or rms else None)
    return {
        "in_chans": channels,
        "dim": dim,
        "depth": len(_blocks(weights)),
        "heads": heads,
        "patch_size": patch,
        "mlp_ratio": ratio,
        "swiglu": gated is not None,
        "cls": bool(tokens),
        "registers": weights["reg_tokens"].shape[1] if "reg_tokens" in weights else 0,
        "positions": positions,
        "pool": "cls" if tokens and layout != "data2vec2" and positions != "relative" else "mean",
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in weights else None,
        "norms": "post" if layout == "data2vec2" else "patches" if "norm_pre.weight" in weights else None,
        "rms_norm": rms,
        "norm_eps": None if eps == 1e-6 else eps,
    }


def _heads(
    weights: Mapping[str, Tensor], inside: Mapping[str, Tensor], layout: str, beside: Mapping[str, Any], file: Path
) -> int:
    """The number of attention heads of the published model. Only rotary and relative positions show it in the
    weights."""
    dim = weights["patch_embed.proj.weight"].shape[0]
    if (scores := weights.get(f"blocks.0.attn.{TABLE}")) is not None:
        return scores.shape[1]
    if "num_attention_heads" in beside:
        return int(beside["num_attention_heads"])
    periods = inside.get("rope_embed.periods")
    if periods is not None:
        ours = ROPE_BASE ** (torch.arange(len(periods)) / len(periods))
        if not torch.allclose(periods.float(), ours, rtol=0.01):  # they may have been stored in bfloat16
            raise UserError(f"{file} has rotary positions of other periods than DINOv3's, which our ViT uses")
        return dim // (4 * len(periods))
    known = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
    if layout == "mocov3":
        known[384] = 12
    elif "pos_embed" not in weights and layout != "aim" and not _is_rms(weights):  # DINOv3, with any names
        known |= {1280: 20, 4096: 32}
    elif layout == "aim":
        known = {1536: 12, 2048: 16, 3072: 24, 4096: 32}
    elif _is_rms(weights):
        known = {1024: 8, 1536: 12, 2048: 16, 3072: 24}
    if dim not in known:
        raise UserError(f"{file} does not say how many attention heads its {dim} channels have: add ,heads=")
    return known[dim]


def _image_size(
    weights: Mapping[str, Tensor],
    options: Mapping[str, Any],
    layout: str,
    wanted: tuple[int, int] | None,
    file: Path,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The grid of the position table in the file, and the requested image size (height, width)."""
    patch, table = options["patch_size"], weights.get("pos_embed")
    if (scores := weights.get(f"blocks.0.attn.{TABLE}")) is not None:
        side = (_side(len(scores) - Offsets.count((1, 1), int(options["cls"])) + 1) + 1) // 2
        if Offsets.count((side, side), int(options["cls"])) != len(scores):
            raise UserError(f"{file} has tables of {len(scores)} relative positions, which do not fit a square grid")
    elif table is None:
        side = 224 // patch
    else:
        side = _side(table.shape[1] - int(options["cls"]))
        if not side:
            raise UserError(
                f"{file} has a position table of {table.shape[1]} rows: no square grid and at most one more token"
            )
    trained = side * patch
    usual = 224 if layout == "dinov2" and trained > 224 and 224 % patch == 0 else trained
    return (side, side), wanted or (usual, usual)


def _positions(
    weights: dict[str, Tensor],
    options: Mapping[str, Any],
    layout: str,
    native: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """Resize the position table for images of `size` by the layout's own rule; on its own grid it is not changed."""
    patch, tokens = options["patch_size"], int(options["cls"])
    grid = size[0] // patch, size[1] // patch
    table = weights.get("pos_embed")
    if options["positions"] == "relative":
        for name in [name for name in weights if name.endswith(TABLE)]:
            weights[name] = resize_offsets(weights[name], native, grid)
    if table is None:
        if options["positions"] == "sincos":
            weights["pos_embed"] = F.pad(sincos_table(grid, options["dim"])[None], (0, 0, tokens, 0))
        return
    if grid == native or 0 in grid:
        return
    first, rest = table[:, :tokens], table[:, tokens:]
    if options["positions"] == "sincos" and _fixed(table, tokens) == "column first":
        resized = sincos_table(grid, options["dim"])[None]
    elif layout == "dinov2" and options["registers"]:
        resized = _interpolated(rest, native, size=grid, antialias=True)
    elif layout in ("dino", "ibot", "dinov2"):  # a tenth of a patch more, against rounding down
        scale = (grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1]
        resized = _interpolated(rest, native, scale_factor=scale)
    else:
        resized = resize_table(rest, native, grid)
    weights["pos_embed"] = torch.cat([first, resized], dim=1)


def _interpolated(table: Tensor, grid: tuple[int, int], **how: Any) -> Tensor:
    image = table.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(image, mode="bicubic", **how).flatten(2).mT.contiguous()


def _name(options: Mapping[str, Any]) -> str:
    """The size in vit.py with that width and depth, else any size, because all options are given."""
    vits = [name for name in backbones.own() if name.startswith("vit_")]
    same = [n for n in vits if all(backbones.defaults(n)[k] == options[k] for k in ("dim", "depth"))]
    return same[0] if same else "vit_base"


def _fixed(table: Tensor, tokens: int) -> str | None:
    """The kind of a fixed sine-cosine position table: "column first" (MAE, I-JEPA) or "row first" (MoCo v3)."""
    side, dim = _side(table.shape[1] - tokens), table.shape[2]
    if not side or dim % 4 or table[:, :tokens].any():
        return None
    ours = sincos_table((side, side), dim)[None]
    if torch.allclose(table[:, tokens:], ours, atol=1e-4):
        return "column first"
    return "row first" if torch.allclose(table[:, tokens:], ours.roll(dim // 2, 2), atol=1e-4) else None


def _side(count: int) -> int:
    """The side of a square grid of that number of patches; 0 if there is none."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def _config(file: Path) -> dict[str, Any]:
    """The config.json that transformers saves with the weights; empty without one. Raises UserError for options that
    our ViT does not support."""
    config = file.parent / "config.json"
    if not config.is_file():
        return {}
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{config} cannot be read: {problem}") from None
    expected = {"hidden_act": ("gelu", "silu"), "rope_theta": (ROPE_BASE,), "use_mean_pooling": (False,)}
    for key, values in expected.items():
        if settings.get(key, values[0]) not in values:
            raise UserError(
                f"{config} says {key} {settings[key]}, and our ViT has {values[0]}: take it as hf:{file.parent}"
            )
    return settings


def _describe(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {options[key]}" for key in ("dim", "depth", "heads", "patch_size", "registers", "positions")
    )
