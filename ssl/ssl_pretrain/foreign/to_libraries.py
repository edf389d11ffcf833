"""Folders that timm or transformers open, from encoders. Each is checked: the library opens it, and gives our features.

An export's own folder is opened by them, too (`backbones.forms`). These folders hold nothing of ours, use transformers' own
classes where there are some, and exist for some encoders whose export only our loader reads.

Shapes: B images, N patches, P prefix tokens (class token, registers), L = P + N, D channels.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import plugins
from ..backbones import forms
from ..backbones.convnext import ConvNeXt
from ..backbones.resnet import ResNet
from ..backbones.swin import NORM_EPS as SWIN_EPS
from ..backbones.swin import Swin
from ..backbones.vit import NORM_EPS, ViT
from ..encoder import Encoder, library_config, save_weights
from ..errors import UserError
from .programs import LIMIT, difference


def to_timm(encoder: Encoder, folder: Path) -> dict[str, float]:
    """Write a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`; returns the difference of each feature
    from the encoder's. Raises UserError if timm is missing or has no such model, and if it gives other features."""
    timm: Any = plugins.optional("timm", "a folder for timm")
    form = _timm_form(encoder)
    if isinstance(form, str):
        raise UserError(f"timm cannot express the encoder {encoder.name}: {form}; our own loader reads its export")
    with _checked(folder) as aside, _quiet():
        _write(encoder, form, aside)
        model = timm.create_model(f"local-dir:{aside}", pretrained=True).eval()
        return _compared(encoder, folder, lambda x: (model.forward_features(x), model(x)))


def to_transformers(encoder: Encoder, folder: Path) -> tuple[str, dict[str, float]]:
    """Write a folder for `transformers.AutoModel.from_pretrained(FOLDER)`: of a class of transformers where one fits, else
    of its wrapper of timm's models. Returns the class's name and the difference of each feature from the encoder's (of
    the whole image's vector only if the class defines the same one).

    Raises UserError if a library is missing or has no such model, and if it gives other features.
    """
    library: Any = plugins.optional("transformers", "a folder for transformers")
    native = _native(encoder)
    form = _timm_form(encoder)
    if isinstance(form, forms.Form) and not form.wrapped:
        form = "it does not read timm's file of this encoder"
    if isinstance(native, str) and isinstance(form, str):
        raise UserError(
            f"transformers cannot express the encoder {encoder.name}: {native}; nor can timm, whose models it wraps: "
            f"{form}; our own loader reads its export"
        )
    with _checked(folder) as aside, _quiet():
        if isinstance(native, str):
            assert isinstance(form, forms.Form)
            plugins.optional("timm", f"a folder for transformers ({native})")
            _write(encoder, form, aside)
        else:
            kind, options, weights = native
            model_class, config = (
                plugins.part(library, each, "a folder for transformers")
                for each in (kind, kind.replace("Model", "Config"))
            )
            made = model_class(config(**options))
            made.load_state_dict(weights)
            made.save_pretrained(aside)
            (aside / "preprocessor_config.json").write_text(json.dumps(_processor(encoder), indent=1) + "\n")
        auto = plugins.part(library, "AutoModel", "a folder for transformers")
        model = auto.from_pretrained(aside, local_files_only=True).eval()
        name = type(model).__name__
        # transformers' own ViTs give the class token; ours may be told to give the mean of the patches.
        pools = not (
            isinstance(encoder.backbone, ViT) and name != "TimmWrapperModel" and encoder.backbone.config.pool != "cls"
        )

        def run(x: Tensor) -> tuple[Tensor, Tensor | None]:
            output = model(pixel_values=x)
            return output.last_hidden_state, output.pooler_output.flatten(1) if pools else None

        return name, _compared(encoder, folder, run)


def _timm_form(encoder: Encoder) -> forms.Form | str:
    """The encoder as a model of timm, or the reason why timm has none; also of an encoder that is a model of timm."""
    config = getattr(encoder.backbone, "timm_config", None)
    if config is None:
        return forms.timm_form(encoder.backbone, exact=False)
    stated = config(encoder.preprocessing)
    return forms.Form("timm", stated["architecture"], stated["model_args"], first_conv=None)


def _write(encoder: Encoder, form: forms.Form, folder: Path) -> None:
    """config.json and the weights in timm's form."""
    weights = {name: value.detach().cpu() for name, value in encoder.backbone.state_dict().items()}
    named = {name: value.contiguous() for name, value in form.theirs(weights).items()}
    save_weights(named, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(library_config(encoder, form), indent=1) + "\n", encoding="utf-8")


def _compared(encoder: Encoder, folder: Path, run: Any) -> dict[str, float]:
    """The differences of a library's features from the encoder's. `run` gives tokens (B, L, D) or a map (B, D, h, w), and
    the vector (B, D) of the whole image or None."""
    backbone = encoder.backbone
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(3, backbone.in_chans, *backbone.image_size, generator=noise)
    with torch.no_grad():
        ours, (tokens, pooled) = encoder(images), run(images)
    expected = {} if pooled is None else {"pooled": ours.pooled}
    found = {} if pooled is None else {"pooled": pooled}
    if isinstance(backbone, ViT):
        expected["tokens"], found["tokens"] = ours.patches if ours.tokens is None else ours.tokens, tokens
    elif isinstance(backbone, ResNet):
        expected["map"], found["map"] = ours.patches, tokens.flatten(2).mT
    elif isinstance(backbone, Swin):  # timm's map has its channels last, transformers has tokens
        expected["patches"], found["patches"] = ours.patches, tokens.flatten(1, -2)
    differences = difference(found, expected)
    if max(differences.values()) > LIMIT:
        text = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        raise UserError(
            f"{folder} is not written: its features differ from the encoder's ({text} of the largest value)"
        )
    return differences


# ---- transformers' own classes.


def _native(encoder: Encoder) -> tuple[str, dict[str, Any], dict[str, Tensor]] | str:
    """transformers' class, the options of its config and its weights; or the reason why it has none."""
    backbone = encoder.backbone
    weights = {name: value.detach().cpu() for name, value in backbone.state_dict().items()}
    if isinstance(backbone, ConvNeXt):
        form = forms.transformers_form(backbone)
        if isinstance(form, str):
            return form
        options = {name: value for name, value in form.arguments.items() if name != "model_type"}
        return form.architecture, options, form.theirs(weights)
    if isinstance(backbone, Swin):
        return _swin(backbone, weights)
    if not isinstance(backbone, ViT):
        return f"transformers' classes do not fit {type(backbone).__name__}"
    config = backbone.config
    if config.rms_norm:
        return "a ViT with RMS norms (--rms-norm) is read by ssl-pretrain only"
    if config.stem != "linear" or config.parallel_branches > 1 or config.shared_relative:
        return "transformers' ViTs have no --stem hmlp, --parallel-branches or --shared-relative"
    if config.norms is not None or config.shortcut_decay != 1 or config.qk_norm or not config.cls:
        return "transformers' ViTs have a class token, and no norms or factors in other places"
    options = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "layer_norm_eps": config.norm_eps or NORM_EPS,
        "image_size": list(backbone.image_size),
        "patch_size": config.patch_size,
        "num_channels": backbone.in_chans,
    }
    if config.positions == "rope":
        hidden = weights["blocks.0.mlp.w3.weight" if config.swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
        options |= {
            "intermediate_size": hidden,
            "use_gated_mlp": config.swiglu,
            "hidden_act": "silu" if config.swiglu else "gelu",
            "num_register_tokens": config.registers,
            "rope_theta": 100.0,
            **{f"{part}_bias": config.qkv_bias for part in ("query", "key", "value")},
        }
        return (
            "DINOv3ViTModel",
            options,
            _named(backbone, weights, "model.layer", "embeddings.patch_embeddings", "norm"),
        )
    if config.positions == "relative" or config.mlp_ratio != int(config.mlp_ratio):
        return "transformers' DINOv2 has a table of positions, and an MLP whose width is a whole multiple"
    if backbone.grid[0] != backbone.grid[1]:
        return "transformers' DINOv2 takes tables of positions for square"
    options |= {"mlp_ratio": int(config.mlp_ratio), "use_swiglu_ffn": config.swiglu, "qkv_bias": config.qkv_bias}
    kind = "Dinov2Model"
    if config.registers:
        kind, options = "Dinov2WithRegistersModel", options | {"num_register_tokens": config.registers}
    place = "embeddings.patch_embeddings.projection"
    return kind, options, _named(backbone, weights, "encoder.layer", place, "layernorm")


def _swin(backbone: Swin, weights: dict[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]] | str:
    """transformers' Swin Transformer V2; the reason why it has none."""
    config = backbone.config
    for stride, _ in backbone.map_strides:
        height, width = (size // int(stride) for size in backbone.image_size)
        if height != width and min(height, width) <= config.window:
            return "transformers' Swin takes one side of a window for both axes, and a map of this size has two"
    options = {
        "image_size": list(backbone.image_size),
        "patch_size": config.patch_size,
        "num_channels": backbone.in_chans,
        "embed_dim": config.dim,
        "depths": list(config.depths),
        "num_heads": list(config.heads),
        "window_size": config.window,
        "pretrained_window_sizes": list(backbone.pretrained_windows),
        "drop_path_rate": 0.0,
        "layer_norm_eps": SWIN_EPS,
    }
    named = {}
    for name, value in weights.items():
        for pattern, replacement in _TO_SWIN:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".qkv.weight"):
            for word, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[name.replace(".qkv.", f".{word}.")] = part.clone()
        else:
            named[name] = value
    return "Swinv2Model", options, named


_TO_SWIN = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^norm\.", "layernorm."),
    (r"^layers\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.cpb_mlp\.", ".attention.self.continuous_position_bias_mlp."),
    (r"\.attn\.q_bias$", ".attention.self.query.bias"),
    (r"\.attn\.v_bias$", ".attention.self.value.bias"),
    (r"\.attn\.", ".attention.self."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def _named(backbone: ViT, weights: dict[str, Tensor], layers: str, patches: str, norm: str) -> dict[str, Tensor]:
    """A ViT's weights under the names of DINOv2 or DINOv3 in transformers. Without layer scale theirs is 1; the token that
    replaces masked patches in pretraining is 0."""
    dim, gated = backbone.dim, backbone.config.swiglu
    mask = (1, dim) if norm == "layernorm" else (1, 1, dim)
    named = {"embeddings.mask_token": torch.zeros(mask)}
    rules = [
        (r"^patch_embed\.proj\.", f"{patches}."),
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^reg_tokens$", "embeddings.register_tokens"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^norm\.", f"{norm}."),
        (r"^blocks\.", f"{layers}."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
        (r"\.mlp\.w3\.", ".mlp.down_proj."),
    ]
    if norm == "norm":  # DINOv3
        named["embeddings.register_tokens"] = torch.zeros(1, 0, dim)  # unless there are some
        rules += [(r"\.mlp\.fc1\.", ".mlp.up_proj."), (r"\.mlp\.fc2\.", ".mlp.down_proj.")]
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                named[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part.clone()
        elif gated and ".mlp.w12." in name:
            for word, part in zip(("gate", "up"), value.chunk(2), strict=True):
                named[name.replace(".w12.", f".{word}_proj.")] = part.clone()
        else:
            named[name] = value
    if backbone.config.layer_scale is None:
        for i in range(backbone.depth):
            named |= {f"{layers}.{i}.layer_scale{j}.lambda1": torch.ones(dim) for j in (1, 2)}
    return named


def _processor(encoder: Encoder) -> dict[str, Any]:
    """preprocessor_config.json: our preprocessing as transformers' image processor."""
    how = encoder.preprocessing
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": how.resize},
        "resample": {"bilinear": 2, "bicubic": 3}[how.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": how.crop[0], "width": how.crop[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
        "do_convert_rgb": how.channels == 3,
    }


@contextlib.contextmanager
def _checked(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that gets its name at the end of a block without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.{os.getpid()}"
    aside.mkdir()
    try:
        yield aside
        if folder.is_dir():
            folder.rmdir()  # empty: the command refuses others
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings about their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
