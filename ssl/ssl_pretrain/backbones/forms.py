"""How timm and transformers express our backbones: the model of theirs, its arguments, and their names of our weights.

A `Form` converts names without loss, so one file of weights serves us and the other library. It is data only: neither
library is imported. Where a library has no such model, the reason is one line of text.

Sources: the model definitions of timm 1.0.28 (`vision_transformer.py`, `eva.py`, `beit.py`, `convnext.py`, `resnet.py`,
`hiera.py`) and of transformers 5.23 (`convnext`, `convnextv2`). The test is that the library's model gives our outputs
(tests/test_forms.py).
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .backbone import Backbone
from .convnext import ConvNeXt
from .grouper import Grouper
from .hiera import Hiera
from .jumbo import Jumbo
from .octic import Octic
from .resnet import ResNet
from .swin import Swin
from .token_stem import TokenStem
from .vit import NORM_EPS, ViT

Rules = tuple[tuple[str, str], ...]  # pairs of patterns and replacements for `re.sub`, in this order

# timm's models of the usual widths. The name only says what timm fills in: every size is given by an argument.
_BY_WIDTH = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
_SWIGLU = "vit_giant_patch14_dinov2"  # the layers of a gated MLP are classes, which no JSON file can name
_WIDE_EPS = "vit_base_patch16_clip_224"  # norms with epsilon 1e-5
_ROPE, _ROPE_WIDE_EPS = "eva_giant_patch14_224", "vit_pe_core_tiny_patch16_384"
_RELATIVE = "beit_base_patch16_224"
_SWIN = "swinv2_tiny_window8_256"
_PARALLEL = "vit_small_patch16_18x2_224"
_STARTS = 1e-5  # an initial value of layer scale; the weights replace it


@dataclass(frozen=True)
class Form:
    """A backbone as a model of another library."""

    library: Literal["timm", "transformers"]
    architecture: str  # the name of timm's model, or transformers' class
    arguments: dict[str, Any]  # of timm's model, or the entries of transformers' config
    classifier: str = "head"  # timm's name of the layer that a classifier would be
    first_conv: str | None = "patch_embed.proj"  # timm's name of the layer that sees the image
    to_theirs: Rules = ()
    to_ours: Rules = ()
    rows: tuple[int, int] = (0, 0)  # position, number: rows of zeros in their table of positions
    # Whether transformers' wrapper of timm's models reads the file, too. It takes the names of timm's model; of a Swin,
    # timm's own reader takes the authors' names.
    wrapped: bool = True
    as_maps: str | None = None  # pattern of vectors (c,) that are (1, 1, 1, c) in theirs
    no_key_bias: bool = False  # they have no bias of keys, which changes no output: it adds one number to all scores

    def theirs(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our weights under their names. `ours` is the inverse, bit for bit, but for keys' biases with `no_key_bias`."""
        if self.no_key_bias:
            weights = dict(weights)
            for name in [name for name in weights if name.endswith(".qkv.bias")]:
                parts = weights.pop(name).chunk(3)
                place = name.removesuffix("qkv.bias")
                weights |= {f"{place}q_bias": parts[0].clone(), f"{place}v_bias": parts[2].clone()}
        named = {_renamed(name, self.to_theirs): value for name, value in weights.items()}
        assert len(named) == len(weights), "two weights got one name"
        if self.as_maps is not None:
            named = {n: v[None, None, None] if re.search(self.as_maps, n) else v for n, v in named.items()}
        if self.rows[1] and "pos_embed" in named:
            at, count = self.rows
            table = named["pos_embed"]
            zeros = table.new_zeros(1, count, table.shape[2])
            named["pos_embed"] = torch.cat([table[:, :at], zeros, table[:, at:]], dim=1)
        return named

    def ours(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Their weights under our names. A table of positions that is not as `theirs` makes it is left as it is, so that
        the comparison with the backbone names it."""
        named = {
            _renamed(n, self.to_ours): v.flatten() if self.as_maps is not None and re.search(self.as_maps, n) else v
            for n, v in weights.items()
        }
        if self.no_key_bias:
            for place in [name.removesuffix("q_bias") for name in named if name.endswith(".q_bias")]:
                if f"{place}v_bias" in named:
                    query, value = named.pop(f"{place}q_bias"), named.pop(f"{place}v_bias")
                    named[f"{place}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
        at, count = self.rows
        table = named.get("pos_embed")
        if count and table is not None and table.ndim == 3 and not table[:, at : at + count].any():
            named["pos_embed"] = torch.cat([table[:, :at], table[:, at + count :]], dim=1)
        return named


def of_export(backbone: Backbone) -> Form | None:
    """The form in which an export's folder holds the weights: timm's, which transformers reads too (TimmWrapper), else
    that of transformers, else None (our own names)."""
    for form in (timm_form(backbone), transformers_form(backbone)):
        if isinstance(form, Form):
            return form
    return None


def timm_form(backbone: Backbone, *, exact: bool = True) -> Form | str:
    """The backbone as a model of timm, or the reason why timm has none. exact: every weight is kept; otherwise weights
    that change no output may be left out (`Form.no_key_bias`)."""
    if isinstance(backbone, ViT):
        return _timm_vit(backbone, exact)
    if isinstance(backbone, ConvNeXt):
        config = backbone.config
        if config.stem_patch == 2 or config.stem_patch >= 8:
            return "timm's ConvNeXt has other strides after a stem with patches of 2, or of 8 and more pixels"
        arguments = {
            "dims": list(config.dims),
            "depths": list(config.depths),
            "patch_size": config.stem_patch,
            "in_chans": backbone.in_chans,
            "global_pool": "avg",
        }
        # Without layer scale by the name, because the argument would be None, which transformers' wrapper drops.
        name = "convnextv2_tiny" if config.layer_scale is None else "convnext_tiny"
        if config.grn != (config.layer_scale is None):
            arguments["use_grn"] = config.grn
        return Form(
            "timm",
            name,
            arguments,
            "head.fc",
            "stem.0",
            to_theirs=((r"^norm\.", "head.norm."),),
            to_ours=((r"^head\.norm\.", "norm."),),
        )
    if isinstance(backbone, ResNet):
        if backbone.config.stem == "small":
            return "timm's ResNets have no 3x3 stem of stride 1 without max pooling"
        arguments = {"layers": list(backbone.config.depths), "in_chans": backbone.in_chans, "global_pool": "avg"}
        name = "resnet50" if backbone.config.bottleneck else "resnet18"
        if backbone.config.width != 64:
            return "timm's ResNets have a stem of 64 channels"
        return Form("timm", name, arguments, "fc", "conv1")
    if isinstance(backbone, Swin):
        return _timm_swin(backbone)
    if isinstance(backbone, Hiera):
        return _timm_hiera(backbone)
    if isinstance(backbone, TokenStem):
        return "timm has no model that begins with a tokenizer"
    if isinstance(backbone, Octic):
        return "timm has no octic-equivariant ViT"
    if isinstance(backbone, Grouper):
        return "timm has no perceptual group tokenizer"
    if isinstance(backbone, Jumbo):
        return "timm has no ViT with a Jumbo token"
    return f"{type(backbone).__name__} is a backbone of another package"


def transformers_form(backbone: Backbone) -> Form | str:
    """The backbone as a model of transformers whose weights differ only in their names, or the reason why there is
    none. (transformers' ViTs hold queries, keys and values apart: `foreign.to_libraries` splits them.)"""
    if isinstance(backbone, ConvNeXt):
        config = backbone.config
        if config.grn and config.layer_scale is not None:
            return "transformers' ConvNeXts of version 2 have no layer scale"
        arguments = {
            "model_type": "convnextv2" if config.grn else "convnext",
            "num_channels": backbone.in_chans,
            "patch_size": config.stem_patch,
            "num_stages": len(config.dims),
            "hidden_sizes": list(config.dims),
            "depths": list(config.depths),
            "hidden_act": "gelu",
            "layer_norm_eps": NORM_EPS,
            "image_size": backbone.image_size[0],
        }
        if not config.grn and config.layer_scale is None:
            arguments["layer_scale_init_value"] = 0.0
        kind = "ConvNextV2Model" if config.grn else "ConvNextModel"
        norms = r"\.grn\." if config.grn else None
        return Form("transformers", kind, arguments, to_theirs=_TO_CONVNEXT, to_ours=FROM_CONVNEXT, as_maps=norms)
    if isinstance(backbone, ViT | Swin):
        return f"transformers' {type(backbone).__name__}s hold queries, keys and values apart"
    if isinstance(backbone, TokenStem):
        return "transformers has no model that begins with a tokenizer"
    return f"transformers' classes have other names for the weights of {type(backbone).__name__}"


_TO_CONVNEXT: Rules = (
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
    (r"^stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc", ".pwconv"),
    (r"\.mlp\.grn\.", ".grn."),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"(^|\.)norm\.", r"\1layernorm."),
)
FROM_CONVNEXT: Rules = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv", ".mlp.fc"),
    (r"\.grn\.", ".mlp.grn."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"(^|\.)layernorm\.", r"\1norm."),
)


def _timm_swin(backbone: Swin) -> Form | str:
    """timm reads a Swin Transformer V2 without a classifier in the authors' names, which are ours: it puts the merging at
    another place itself."""
    config = backbone.config
    for stride, _ in backbone.map_strides:
        for side in (size // int(stride) for size in backbone.image_size):
            if side > config.window and side % config.window:
                return (
                    f"timm rolls a map before it pads it to whole windows, and we after, as transformers: a map of {side} "
                    f"positions does not divide into windows of {config.window} (--window)"
                )
    arguments = {
        "img_size": list(backbone.image_size),
        "patch_size": config.patch_size,
        "in_chans": backbone.in_chans,
        "embed_dim": config.dim,
        "depths": list(config.depths),
        "num_heads": list(config.heads),
        "window_size": config.window,
        "pretrained_window_sizes": list(backbone.pretrained_windows),
        "global_pool": "avg",
    }
    return Form("timm", _SWIN, arguments, "head.fc", wrapped=False)


def _timm_vit(backbone: ViT, exact: bool) -> Form | str:
    config, eps = backbone.config, backbone.config.norm_eps or NORM_EPS
    if config.rms_norm:
        return "a ViT with RMS norms (--rms-norm) is read by ssl-pretrain only"
    if config.norms == "post":
        return "timm's ViTs have no norm after each branch (--norms post)"
    if config.stem == "hmlp":
        return "timm's ViTs have no hMLP stem (--stem hmlp)"
    if config.parallel_branches > 1 and (
        config.parallel_branches > 2 or config.swiglu or eps != NORM_EPS or config.positions in ("rope", "relative")
    ):
        return "timm's ViTs with --parallel-branches have two, epsilon 1e-6, a table of positions and no gated MLPs"
    if config.shortcut_decay != 1:
        return "timm's ViTs have no factor on the shortcut (--shortcut-decay)"
    if eps not in (1e-6, 1e-5):
        return f"timm's ViTs have norms with epsilon 1e-6 or 1e-5, not {eps:g} (--norm-eps)"
    if config.norms == "patches" and (eps != NORM_EPS or config.positions in ("rope", "relative")):
        return "timm's ViTs with a norm of the patch embeddings have a table of positions and epsilon 1e-6"
    arguments: dict[str, Any] = {
        "img_size": list(backbone.image_size),
        "patch_size": config.patch_size,
        "in_chans": backbone.in_chans,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "global_pool": "token" if config.pool == "cls" else "avg",
        "qkv_bias": config.qkv_bias,
        # Not None: transformers' wrapper drops arguments that are None, and timm's own would count.
        "init_values": False if config.layer_scale is None else _STARTS,
    }
    hidden = backbone.get_submodule("blocks.0.mlp").get_parameter("w3.weight").shape[1] if config.swiglu else 0
    if config.positions == "relative":
        return _timm_beit(backbone, arguments, exact)
    if config.positions == "rope":
        return _timm_eva(backbone, arguments, hidden, eps)
    arguments |= {
        "mlp_ratio": (2 * hidden + 0.5) / config.dim if config.swiglu else config.mlp_ratio,
        "qk_norm": config.qk_norm,
        "class_token": config.cls,
        "reg_tokens": config.registers,
        "no_embed_class": False,
        "pre_norm": False,
        "fc_norm": False,
    }
    if config.norms == "patches":
        arguments["embed_norm_layer"] = "layernorm"
    if config.swiglu and eps != NORM_EPS:
        return "timm's ViTs with gated MLPs (--swiglu) have norms with epsilon 1e-6"
    name = _SWIGLU if config.swiglu else _WIDE_EPS if eps != NORM_EPS else _BY_WIDTH.get(config.dim, _BY_WIDTH[768])
    name = _PARALLEL if config.parallel_branches == 2 else name
    return Form(
        "timm",
        name,
        arguments,
        to_theirs=(
            (r"^reg_tokens$", "reg_token"),
            (r"\.mlp\.w12\.", ".mlp.fc1."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
            (r"^norm_pre\.", "patch_embed.norm."),
        ),
        to_ours=(
            (r"^reg_token$", "reg_tokens"),
            *(((r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3.")) if config.swiglu else ()),
            (r"^patch_embed\.norm\.", "norm_pre."),
        ),
        rows=(int(config.cls), config.registers),  # our registers have no positions
    )


def _timm_eva(backbone: ViT, arguments: dict[str, Any], hidden: int, eps: float) -> Form | str:
    """timm's ViTs with rotary positions."""
    config = backbone.config
    if config.qk_norm:
        return "timm's ViTs with rotary positions have no norm of queries and keys (--qk-norm)"
    if config.layer_scale is None:
        del arguments["init_values"]
    arguments |= {
        "mlp_ratio": (hidden + 0.5) / config.dim if config.swiglu else config.mlp_ratio,
        "swiglu_mlp": config.swiglu,
        "class_token": config.cls,
        "num_reg_tokens": config.registers,
        "attn_type": "rope",
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": 100.0,
        "rope_rotate_half": True,
        "rope_grid_indexing": "ij",
        "use_pre_transformer_norm": False,
        "use_post_transformer_norm": True,
        "use_fc_norm": False,
    }
    return Form(
        "timm",
        _ROPE if eps == NORM_EPS else _ROPE_WIDE_EPS,
        arguments,
        to_theirs=(
            (r"^reg_tokens$", "reg_token"),
            (r"\.mlp\.w12\.", ".mlp.fc1."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
            (r"\.ls(\d)\.gamma$", r".gamma_\1"),
        ),
        to_ours=(
            (r"^reg_token$", "reg_tokens"),
            *(((r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3.")) if config.swiglu else ()),
            (r"\.gamma_(\d)$", r".ls\1.gamma"),
        ),
    )


def _timm_beit(backbone: ViT, arguments: dict[str, Any], exact: bool) -> Form | str:
    """timm's ViTs with relative positions."""
    config = backbone.config
    if not config.cls or config.registers or config.swiglu or config.qk_norm or config.norm_eps not in (None, NORM_EPS):
        return "timm's BEiT has a class token, and no registers, gated MLPs, norm of queries and keys or other epsilon"
    if config.pool != "cls":
        return "timm's BEiT takes the norm after the mean of the patches, ours before (--pool cls fits)"
    if backbone.grid[0] != backbone.grid[1]:
        return "timm's BEiT loads tables of relative positions of square grids only"
    if config.qkv_bias and config.k_bias and exact:
        return "timm's BEiT has no bias of keys, which `ssl-export to timm` leaves out (--no-k-bias fits)"
    arguments |= {
        "mlp_ratio": config.mlp_ratio,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": not config.shared_relative,
        "use_shared_rel_pos_bias": config.shared_relative,
    }
    return Form(
        "timm",
        _RELATIVE,
        arguments,
        to_theirs=((r"\.ls(\d)\.gamma$", r".gamma_\1"),),
        to_ours=((r"\.gamma_(\d)$", r".ls\1.gamma"),),
        no_key_bias=config.qkv_bias,
    )


def _timm_hiera(backbone: Hiera) -> Form:
    """timm's Hiera has a table of positions for one size of images."""
    config, stride = backbone.config, backbone.config.patch_stride
    arguments = {
        "img_size": list(backbone.image_size),
        "in_chans": backbone.in_chans,
        "embed_dim": config.embed_dim,
        "num_heads": config.heads,
        "stages": list(config.depths),
        "q_pool": config.q_pool,
        "mask_unit_size": [config.unit_tokens, config.unit_tokens],
        "mask_unit_attn": [stage < config.local_stages for stage in range(len(config.depths))],
        "patch_kernel": [2 * stride - 1, 2 * stride - 1],
        "patch_stride": [stride, stride],
        "patch_padding": [stride - 1, stride - 1],
        "global_pool": "avg",
    }
    return Form(
        "timm",
        "hiera_tiny_224",
        arguments,
        "head.fc",
        to_theirs=((r"^norm\.", "head.norm."),),
        to_ours=((r"^head\.norm\.", "norm."),),
    )


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
