"""Each published layout through --init-from to the first step of a method that fits it: random weights, small sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_helpers import tiny_flags
from oracles import import_timm
from published_layouts import BESIDE_BEIT, DIM, PATCH, SIDE, dinov3_names, saved, timm_beit, timm_vit, with_positions
from ssl_pretrain.launch.pretrain import main
from torch import Tensor

from ssl_pretrain import checkpoint
from ssl_pretrain.foreign.published import read


def mae() -> dict[str, Any]:
    return {"model": with_positions(timm_vit()).state_dict() | {"mask_token": torch.zeros(1, 1, 8)}}


def dino() -> dict[str, Any]:
    return {"teacher": {f"backbone.{k}": v for k, v in timm_vit().state_dict().items()}}


def ibot() -> dict[str, Any]:
    return {"state_dict": timm_vit().state_dict() | {"masked_embed": torch.zeros(1, DIM)}}


def dinov2() -> dict[str, Any]:
    weights = dict(timm_vit(reg_tokens=4, init_values=0.1).state_dict())
    weights["register_tokens"] = weights.pop("reg_token")
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], weights["pos_embed"][:, -36:]], dim=1)
    return weights | {"mask_token": torch.zeros(1, DIM)}


def dinov3() -> dict[str, Any]:
    sizes = {"embed_dim": DIM, "depth": 3, "num_heads": 4, "num_classes": 0, "img_size": 64}
    return dinov3_names(import_timm().create_model("vit_small_patch16_dinov3_qkvb", **sizes))


def ijepa() -> dict[str, Any]:
    model = with_positions(timm_vit(class_token=False, global_pool="avg", fc_norm=False))
    return {"target_encoder": {f"module.{k}": v for k, v in model.state_dict().items()}}


def mocov3() -> dict[str, Any]:
    model = with_positions(timm_vit(), row_first=True)
    return {"state_dict": {f"module.base_encoder.{k}": v for k, v in model.state_dict().items()}}


def beit() -> dict[str, Any]:
    return {"model": timm_beit(use_rel_pos_bias=True).state_dict() | BESIDE_BEIT}


def aimv2() -> dict[str, Any]:
    sizes = {"embed_dim": DIM, "depth": 3, "num_heads": 4, "img_size": SIDE, "patch_size": PATCH, "num_classes": 0}
    return import_timm().create_model("aimv2_large_patch14_224", **sizes).state_dict()


# The file, the method that goes on from it, and further flags.
CASES: list[tuple[Callable[[], dict[str, Any]], str, str]] = [
    (mae, "mae", ""),
    (dino, "dino", ""),
    (ibot, "ibot", ""),
    (dinov2, "dinov2", ""),
    (dinov3, "dinov2", "--image-size 64"),
    (ijepa, "ijepa", ""),
    (mocov3, "mocov3", ""),
    (beit, "simmim", ""),
    (aimv2, "aim", ""),
]


@pytest.mark.parametrize(("content", "method", "flags"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_layout_to_its_first_step(
    content: Callable[[], dict[str, Any]], method: str, flags: str, photos: Path, tmp_path: Path
) -> None:
    file = saved(content(), tmp_path)
    argv = ["--method", method, *tiny_flags(method), "--init-from", f"torch:{file},heads=4", "--data", str(photos)]
    argv += "--batch-size 16 --monitor-every 0 --picture-every 0 --precision fp32 --no-score --workers 0".split()
    argv += [
        *flags.split(),
        "--out",
        str(tmp_path / "run"),
        "--warmup-steps",
        "0",
        "--lr",
        "1e-4",
        "--final-lr",
        "1e-4",
    ]
    assert main([*argv, "--steps", "1"]) == 0
    before = read(file, heads=4).backbone.state_dict()
    state: dict[str, Tensor] = checkpoint.load(tmp_path / "run" / "checkpoints", 1)["method"]
    after = {name: state[f"encoder.{name}"] for name in before}
    # One step of AdamW moves each weight by its rate, and by the weight decay of as much again at most.
    matrices = [name for name in before if name.endswith("mlp.fc1.weight") or name.endswith("mlp.w12.weight")]
    assert matrices
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=3e-4, rtol=1e-3)
    assert all(not torch.equal(after[name], before[name]) for name in matrices)
