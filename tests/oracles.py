"""Other people's implementations that tests compare with. They are not dependencies: a test skips where one is absent."""

import contextlib
import re
import warnings
from collections.abc import Iterable
from types import ModuleType

import pytest
import torch

_LIBRARY: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """torchvision beside a CPU build of torch: two operators that it wants at import are declared first."""
    global _LIBRARY  # noqa: PLW0603 (the declaration lasts as long as the library object)
    if _LIBRARY is None and not hasattr(torch.ops.torchvision, "nms"):
        _LIBRARY = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _quietly("torchvision")


def import_timm() -> ModuleType:
    """timm, which needs torchvision."""
    import_torchvision()
    return _quietly("timm")


def import_transformers() -> ModuleType:
    """transformers, which uses torchvision where that is installed."""
    with contextlib.suppress(pytest.skip.Exception):
        import_torchvision()
    return _quietly("transformers")


def to_transformers(weights: dict[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Our ViT weights under the names of a transformers model (ViT, ViTMAE, DINOv2, DINOv3; releases 4 and 5). Its mask
    token, which our encoders lack, is zero."""
    simple = [
        (r"^embeddings\.(patch_embeddings)(\.projection)?\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.register_tokens$", "reg_tokens"),
        (r"^embeddings\.", ""),
        (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.", r".attn.\2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
        (r"\.(mlp\.down_proj|(?<!attention\.)output\.dense)\.", ".mlp.fc2."),
        (r"\.weights_in\.", ".w12."),
        (r"\.weights_out\.", ".w3."),
        (r"^layernorm\.", "norm."),
    ]
    names, renamed = list(names), {}
    if any(".gate_proj." in name for name in names):  # a gated MLP, whose up_proj and down_proj are other things
        simple = [(r"\.down_proj\.", ".w3."), *simple[:-5], (r"^layernorm\.", "norm.")]
    for theirs in names:
        ours = theirs
        for pattern, replacement in simple:
            ours = re.sub(pattern, replacement, ours)
        part = re.search(r"\.attn\.([qkv])[a-z_]*\.", ours)
        if part:
            fused = weights[ours[: part.start()] + ".attn.qkv." + ours[part.end() :]]
            renamed[theirs] = fused.chunk(3)["qkv".index(part[1])].clone()
        elif gated := re.search(r"\.(gate_proj|up_proj)\.", ours):
            fused = weights[ours[: gated.start()] + ".w12." + ours[gated.end() :]]
            renamed[theirs] = fused.chunk(2)[gated[1] == "up_proj"].clone()
        elif ours == "mask_token":
            renamed[theirs] = torch.zeros(1, weights["norm.weight"].shape[0])
        else:
            renamed[theirs] = weights[ours]
    return renamed


def _quietly(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed: nothing to compare with")
