"""Official checkpoint layouts into our ViT: random weights in each layout, against forwards that are not ours."""

import argparse
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import import_timm, import_transformers
from PIL import Image
from published_layouts import (
    BESIDE_BEIT,
    DIM,
    IMAGES,
    PATCH,
    SIDE,
    dinov3_names,
    saved,
    scatter,
    sincos,
    timm_beit,
    timm_vit,
    with_positions,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_pretrain import encoder as exported
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign import libraries
from ssl_pretrain.foreign.published import read, transformers_preprocessing


def tokens(module: Any, images: Tensor = IMAGES) -> Tensor:
    with torch.inference_mode():
        return module.forward_features(images)


def check(encoder: exported.Encoder, expected: Tensor, prefix: int, images: Tensor = IMAGES) -> None:
    """The encoder's tokens are the expected ones (B, P + N, D)."""
    with torch.inference_mode():
        found = encoder(images)
    if prefix:
        torch.testing.assert_close(found.prefix, expected[:, :prefix], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.cls, expected[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.patches, expected[:, prefix:], atol=1e-4, rtol=1e-4)


# ---- Each layout.


def test_mae_with_its_decoder(tmp_path: Path) -> None:
    model = with_positions(timm_vit())
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pred.weight": torch.zeros(3, 8),
        "decoder_pos_embed": torch.zeros(1, 37, 8),
    }
    encoder = read(saved({"model": model.state_dict() | decoder}, tmp_path), heads=4)
    check(encoder, tokens(model), 1)
    assert encoder.lineage["method"] == "mae"
    assert encoder.lineage["left_out"] == ["decoder_pos_embed", "decoder_pred.weight", "mask_token"]
    assert encoder.backbone.config.positions == "sincos"
    assert torch.equal(encoder.backbone.pos_embed, model.pos_embed)
    assert (encoder.preprocessing.mean, encoder.preprocessing.crop) == ((0.485, 0.456, 0.406), (SIDE, SIDE))


def test_dino_has_a_teacher_and_a_student_and_settings(tmp_path: Path) -> None:
    teacher, student = timm_vit(1), timm_vit(2)
    content = {
        "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()}
        | {"head.mlp.0.weight": torch.zeros(2, 2)},
        "student": {f"module.backbone.{k}": v for k, v in student.state_dict().items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(arch="vit_small", patch_size=8),
        "epoch": 7,
    }
    file = saved(content, tmp_path)
    encoder = read(file, heads=4)
    check(encoder, tokens(teacher), 1)
    assert (encoder.lineage["method"], encoder.lineage["part"]) == ("dino", "teacher.backbone")
    assert encoder.lineage["left_out_of_other_parts"] == len(student.state_dict()) + 2
    assert encoder.backbone.config.positions == "learned"
    assert encoder.backbone.config.pool == "cls"
    check(read(file, heads=4, part="student"), tokens(student), 1)
    with pytest.raises(
        UserError, match=r"has 0 encoders called 'tutor'; it has: teacher\.backbone, student\.module\.backbone"
    ):
        read(file, heads=4, part="tutor")


def test_beit_with_one_table_for_all_blocks(tmp_path: Path) -> None:
    model = timm_beit(use_shared_rel_pos_bias=True)
    index = {"rel_pos_bias.relative_position_index": torch.zeros(37, 37, dtype=torch.int64)}
    encoder = read(saved({"model": model.state_dict() | BESIDE_BEIT | index}, tmp_path))
    check(encoder, tokens(model), 1)
    assert (encoder.lineage["method"], encoder.backbone.config.positions) == ("beit", "relative")
    assert encoder.lineage["left_out"] == ["lm_head.weight", "mask_token", "rel_pos_bias.relative_position_index"]
    assert encoder.backbone.config.pool == "mean"
    assert (encoder.preprocessing.mean, encoder.preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)


def test_beit_v2_with_a_table_a_block_and_layers_of_pretraining(tmp_path: Path) -> None:
    model = timm_beit(use_rel_pos_bias=True)
    extra = {f"cls_pt_layers.0.{n}": v for n, v in model.blocks[0].state_dict().items()}
    file = saved({"model": model.state_dict() | BESIDE_BEIT | extra}, tmp_path)
    encoder = read(file)
    check(encoder, tokens(model), 1)
    assert encoder.preprocessing.mean == (0.485, 0.456, 0.406)
    exported.save(tmp_path / "export", encoder)
    check(exported.load(tmp_path / "export"), tokens(model), 1)


def test_beit_for_another_size(tmp_path: Path) -> None:
    """Each offset's score is that of the same part of the image on the grid it was trained on."""
    model = timm_beit(use_rel_pos_bias=True)
    encoder = read(saved(model.state_dict(), tmp_path), image_size=(64, 32))
    name = "blocks.1.attn.relative_position_bias_table"
    table = model.state_dict()[name].double().numpy()
    rows, columns = cubic_weights(11, 15, 15 / 11), cubic_weights(11, 7, 7 / 11)
    expected = np.einsum("iy,jx,yxh->ijh", rows, columns, table[:121].reshape(11, 11, 4)).reshape(105, 4)
    found = encoder.backbone.state_dict()[name].numpy()
    np.testing.assert_allclose(found[:105], expected, atol=1e-5)
    np.testing.assert_array_equal(found[105:], table[121:].astype(np.float32))
    # and an encoder of the trained size makes the same of an image of another
    images = torch.randn(2, 3, 64, 32)
    with torch.inference_mode():
        whole = read(saved(model.state_dict(), tmp_path))
        torch.testing.assert_close(whole(images).patches, encoder(images).patches)


def test_beit_that_was_fine_tuned_is_refused(tmp_path: Path) -> None:
    model = timm_beit(use_rel_pos_bias=True, global_pool="avg")
    with pytest.raises(UserError, match=r"BEiT's norm after the mean of the patches.*take the original model"):
        read(saved(model.state_dict(), tmp_path))
    weights = timm_beit(use_rel_pos_bias=True).state_dict()
    for i in range(3):
        weights[f"blocks.{i}.attn.relative_position_bias_table"] = torch.zeros(30, 4)
    with pytest.raises(UserError, match="tables of 30 relative positions, which do not fit a square grid"):
        read(saved(weights, tmp_path))


def test_ibot_with_layer_scale(tmp_path: Path) -> None:
    model = timm_vit(init_values=0.1)
    weights = {
        k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in model.state_dict().items()
    }
    encoder = read(saved({"state_dict": weights | {"masked_embed": torch.zeros(1, DIM)}}, tmp_path), heads=4)
    check(encoder, tokens(model), 1)
    assert encoder.lineage["method"] == "ibot"


@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2_with_registers_and_a_gated_mlp(tmp_path: Path, chunked: bool) -> None:
    timm = import_timm()
    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.25}  # 2 x 168 channels
    model = timm_vit(reg_tokens=4, no_embed_class=True, init_values=0.1, **gated)
    weights = {}
    for name, value in model.state_dict().items():
        name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3").replace("reg_token", "register_tokens")
        weights[name.replace("blocks.", "blocks.0.") if chunked else name] = value
    # Theirs: a row for the class token, which timm adds to the token itself.
    row = torch.randn(1, 1, DIM)
    weights["pos_embed"], weights["cls_token"] = torch.cat([row, model.pos_embed], 1), model.cls_token - row
    weights["mask_token"] = torch.zeros(1, DIM)
    content = {"teacher": {f"backbone.{k}": v for k, v in weights.items()}} if chunked else weights
    encoder = read(saved(content, tmp_path), heads=4)
    check(encoder, tokens(model), 5)
    assert encoder.lineage["method"] == "dinov2"
    assert encoder.lineage["left_out"] == ["mask_token"]
    # timm's own names of the same model
    check(read(saved(model.state_dict(), tmp_path), heads=4), tokens(model), 5)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"])
def test_dinov3(tmp_path: Path, name: str) -> None:
    timm = import_timm()
    model = scatter(timm.create_model(name, embed_dim=DIM, depth=3, num_heads=4, num_classes=0, img_size=64))
    images = torch.randn(2, 3, 64, 96)
    encoder = read(saved(dinov3_names(model), tmp_path))
    assert encoder.backbone.config.heads == 4
    assert encoder.backbone.norm.eps == 1e-5
    check(encoder, tokens(model, images), 5, images)
    assert encoder.lineage["method"] == "dinov3"


def test_ijepa_takes_the_target_encoder(tmp_path: Path) -> None:
    model, other = (with_positions(timm_vit(s, class_token=False, global_pool="avg", fc_norm=False)) for s in (1, 2))
    content = {
        "encoder": {f"module.{k}": v for k, v in other.state_dict().items()},
        "target_encoder": {f"module.{k}": v for k, v in model.state_dict().items()},
        "predictor": {"module.predictor_embed.weight": torch.zeros(4, 4)},
        "epoch": 3,
    }
    encoder = read(saved(content, tmp_path), heads=4)
    check(encoder, tokens(model), 0)
    assert (encoder.lineage["method"], encoder.lineage["part"]) == ("ijepa", "target_encoder.module")
    check(read(tmp_path / "checkpoint.pth", heads=4, part="encoder"), tokens(other), 0)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(IMAGES).pooled, tokens(model).mean(1), atol=1e-4, rtol=1e-4)


def test_moco_v3_small_has_twelve_heads(tmp_path: Path) -> None:
    model = with_positions(timm_vit(embed_dim=384, num_heads=12, depth=1), row_first=True)
    parts = {
        f"module.{part}.{k}": v for part in ("base_encoder", "momentum_encoder") for k, v in model.state_dict().items()
    }
    parts |= {"module.base_encoder.head.0.weight": torch.zeros(4, 4), "module.predictor.0.weight": torch.zeros(4, 4)}
    encoder = read(saved({"state_dict": parts, "arch": "vit_small"}, tmp_path))
    check(encoder, tokens(model), 1)
    assert (encoder.lineage["method"], encoder.backbone.config.heads) == ("mocov3", 12)
    assert encoder.lineage["left_out"] == ["head.*.weight"]
    # Known by its positions alone, where a file has lost its prefixes.
    assert read(saved(dict(model.state_dict()), tmp_path)).backbone.config.heads == 12


def test_aim(tmp_path: Path) -> None:
    norm = {"embed_norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "qkv_bias": False, "proj_bias": False}
    model = timm_vit(img_size=224, patch_size=14, **options, **norm)
    model.pos_embed.data = torch.from_numpy(sincos(16, DIM)).float()[None]  # theirs is computed, not stored
    names = {"patch_embed.": "preprocessor.patchifier.", "blocks.": "trunk.blocks.", "norm.": "trunk.post_trunk_norm."}
    weights = {"head.linear.weight": torch.zeros(2, DIM)}
    for name, value in model.state_dict().items():
        start = next((ours for ours in names if name.startswith(ours)), None)
        if start:
            weights[names[start] + name[len(start) :].replace("norm1", "norm_1").replace("norm2", "norm_2")] = value
    assert not any(name.endswith(("qkv.bias", "fc1.bias", "attn.proj.bias")) for name in weights)
    images = torch.randn(1, 3, 224, 224)
    encoder = read(saved(weights, tmp_path), heads=4)
    check(encoder, tokens(model, images), 0, images)
    assert encoder.lineage["method"] == "aim"
    assert encoder.backbone.layer_of("norm_pre.weight") == 0
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))[None]
    with torch.inference_mode():  # the norm of the patches is theirs wherever they stand
        found = encoder(images, keep=order).patches
    torch.testing.assert_close(found, tokens(model, images)[:, order[0]], atol=1e-4, rtol=1e-4)


def data2vec2(weights: dict[str, Tensor], images: Tensor, heads: int, prenet: int, blocks: int) -> Tensor:
    """fairseq's image model by its formulas: post-norm blocks behind a norm of all tokens; no norm at the end."""
    w = {name.removeprefix("modality_encoders.IMAGE."): value for name, value in weights.items()}
    x = F.conv2d(images, w["local_encoder.proj.weight"], w["local_encoder.proj.bias"], stride=PATCH).flatten(2).mT
    x = x + w["fixed_positional_encoder.positions"]
    x = torch.cat([w["extra_tokens"].expand(len(x), -1, -1), x], 1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = norm(x, "context_encoder.norm")
    for name in [f"context_encoder.blocks.{i}" for i in range(prenet)] + [f"blocks.{i}" for i in range(blocks)]:
        q, k, v = linear(x, f"{name}.attn.qkv").chunk(3, -1)
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        seen = ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = norm(x + linear(seen.transpose(1, 2).flatten(2), f"{name}.attn.proj"), f"{name}.norm1")
        x = norm(x + linear(F.gelu(linear(x, f"{name}.mlp.fc1")), f"{name}.mlp.fc2"), f"{name}.norm2")
    return x


def test_data2vec2(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    image = "modality_encoders.IMAGE"
    shapes = {f"{image}.local_encoder.proj.weight": (DIM, 3, PATCH, PATCH), f"{image}.local_encoder.proj.bias": (DIM,)}
    shapes |= {
        f"{image}.extra_tokens": (1, 1, DIM),
        f"{image}.decoder.blocks.0.weight": (3, 3),
        "_ema.blocks.0.x": (2,),
    }
    shapes |= {f"{image}.context_encoder.norm.{kind}": (DIM,) for kind in ("weight", "bias")}
    for block in [f"{image}.context_encoder.blocks.{i}" for i in range(2)] + [f"blocks.{i}" for i in range(2)]:
        for name, (rows, columns) in {
            "attn.qkv": (3, 1),
            "attn.proj": (1, 1),
            "mlp.fc1": (4, 1),
            "mlp.fc2": (1, 4),
        }.items():
            shapes |= {f"{block}.{name}.weight": (rows * DIM, columns * DIM), f"{block}.{name}.bias": (rows * DIM,)}
        shapes |= {f"{block}.norm{i}.{kind}": (DIM,) for i in (1, 2) for kind in ("weight", "bias")}
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights[f"{image}.fixed_positional_encoder.positions"] = torch.from_numpy(sincos(6, DIM)).float()[None]
    encoder = read(saved({"model": weights, "cfg": {}}, tmp_path), heads=4)
    check(encoder, data2vec2(weights, IMAGES, 4, 2, 2), 1)
    assert encoder.lineage["method"] == "data2vec2"
    assert encoder.backbone.depth == 4
    with torch.inference_mode():
        assert torch.equal(encoder(IMAGES, blocks=(-1,)).blocks[0][:, 1:], encoder(IMAGES).patches)
    assert "_ema.blocks.*.x" in encoder.lineage["left_out"]


def close(found: Tensor, expected: Tensor) -> None:
    """The largest difference is at most 1e-5 of the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", ["original", "timm"])
def test_aimv2(layout: str, tmp_path: Path) -> None:
    timm = import_timm()
    sizes = {"embed_dim": DIM, "depth": 3, "num_heads": 4, "img_size": SIDE, "patch_size": PATCH, "num_classes": 0}
    model = scatter(timm.create_model("aimv2_large_patch14_224", **sizes))
    names = {
        "patch_embed.": "preprocessor.patchifier.", "pos_embed": "preprocessor.pos_embed", "blocks.": "trunk.blocks.",
        "norm.": "trunk.post_trunk_norm.",
    }  # fmt: skip
    weights = {}
    for name, value in model.state_dict().items():
        start = next(ours for ours in names if name.startswith(ours))
        inner = name[len(start) :].replace("norm1", "norm_1").replace("norm2", "norm_2")
        inner = inner.replace("fc1_g", "fc1").replace("fc1_x", "fc3")
        weights[names[start] + inner if layout == "original" else name] = value
    assert not any("norm" in name and name.endswith("bias") for name in weights)
    encoder = read(saved(weights, tmp_path), heads=4)
    with torch.inference_mode():
        close(encoder(IMAGES).patches, tokens(model))
    config = encoder.backbone.config
    assert (encoder.lineage["method"], config.rms_norm, config.swiglu, config.norm_eps) == ("aimv2", True, True, 1e-5)
    assert (config.cls, config.pool, config.norms) == (False, "mean", "patches")
    assert encoder.preprocessing.mean == timm.data.OPENAI_CLIP_MEAN
    assert encoder.preprocessing.std == timm.data.OPENAI_CLIP_STD
    exported.save(tmp_path / "export", encoder)
    with torch.inference_mode():
        close(exported.load(tmp_path / "export")(IMAGES).patches, tokens(model))


@pytest.mark.parametrize("native", [False, True])
def test_aimv2_of_transformers(native: bool, tmp_path: Path) -> None:
    transformers = import_transformers()
    sizes = {**SIZES, "num_attention_heads": 2, "intermediate_size": 176, "rms_norm_eps": 1e-3, "is_native": native}
    model = scatter(transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**sizes)))
    model.save_pretrained(tmp_path)
    encoder = read(tmp_path / "model.safetensors", image_size=(SIDE, SIDE))
    with torch.inference_mode():
        close(encoder(IMAGES).patches, model(pixel_values=IMAGES).last_hidden_state)
    assert (encoder.backbone.config.heads, encoder.backbone.config.norm_eps) == (2, 1e-3)
    assert encoder.backbone.config.positions == ("sincos" if native else "learned")
    assert all(name.startswith("head.") for name in encoder.lineage["left_out"])


def test_published_widths_of_aimv2_have_heads_of_128_channels(tmp_path: Path) -> None:
    timm = import_timm()
    model = timm.create_model("aimv2_large_patch14_224", depth=1, num_classes=0)
    assert read(saved(model.state_dict(), tmp_path)).backbone.config.heads == 8 == model.blocks[0].attn.num_heads


# ---- transformers' names.

SMALL = {"hidden_size": DIM, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 4 * DIM}
SIZES = {**SMALL, "image_size": SIDE, "patch_size": PATCH}
KINDS = [
    ("ViT", {**SIZES}, 1),
    ("ViTMAE", {**SIZES, "mask_ratio": 0.0}, 1),
    ("IJepa", {**SIZES}, 0),
    ("Dinov2", {**SIZES, "mlp_ratio": 4}, 1),
    ("Dinov2", {**SIZES, "mlp_ratio": 4, "use_swiglu_ffn": True}, 1),
    ("Dinov2WithRegisters", {**SIZES, "mlp_ratio": 4, "num_register_tokens": 2}, 3),
    ("Beit", {**SIZES, "use_relative_position_bias": True, "use_mean_pooling": False}, 1),
    ("Beit", {**SIZES, "use_shared_relative_position_bias": True, "use_mean_pooling": False}, 1),
    ("DINOv3ViT", {**SIZES, "num_register_tokens": 2}, 3),
    ("DINOv3ViT", {**SIZES, "num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"}, 3),
]


@pytest.mark.parametrize(("kind", "options", "prefix"), KINDS)
def test_transformers(kind: str, options: dict, prefix: int, tmp_path: Path) -> None:
    transformers = import_transformers()
    config = getattr(transformers, f"{kind}Config")(**options)
    model = scatter(getattr(transformers, f"{kind}Model")(config))
    if kind == "ViTMAE":
        with_positions_of(model)
    model.save_pretrained(tmp_path)
    encoder = read(tmp_path / "model.safetensors")
    noise = {"noise": torch.arange(36.0).expand(2, -1)} if kind == "ViTMAE" else {}
    with torch.inference_mode():
        expected = model(pixel_values=IMAGES, **noise).last_hidden_state
    check(encoder, expected, prefix)
    assert encoder.backbone.config.heads == 4


def with_positions_of(model: Any) -> None:
    model.embeddings.position_embeddings.data[0, 1:] = torch.from_numpy(sincos(6, DIM)).float()
    model.embeddings.position_embeddings.data[0, 0] = 0


def test_preprocessing_is_what_the_processor_beside_states(tmp_path: Path) -> None:
    transformers = import_transformers()
    model = scatter(transformers.ViTModel(transformers.ViTConfig(**SIZES)))
    model.save_pretrained(tmp_path)
    processor = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "size": {"shortest_edge": 54},
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    how = libraries.load(f"torch:{tmp_path / 'model.safetensors'}").preprocessing
    assert how == exported.Preprocessing(54, (SIDE, SIDE), "bicubic", (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(UserError, match=r"mean is \(0\.5, 0\.5, 0\.5\) for this model"):
        libraries.load(f"torch:{tmp_path / 'model.safetensors'},mean=imagenet")
    for change in ({"resample": 1}, {"do_normalize": False}, {"image_mean": None}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | change))
        with pytest.raises(UserError, match="preprocessor_config"):
            transformers_preprocessing(tmp_path)


def test_a_config_that_our_vit_is_not(tmp_path: Path) -> None:
    transformers = import_transformers()
    transformers.ViTModel(transformers.ViTConfig(**SIZES, hidden_act="relu")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hidden_act relu, and our ViT has gelu: take it as hf:"):
        read(tmp_path / "model.safetensors")


# ---- Sizes.


def cubic_weights(old: int, new: int, scale: float, a: float = -0.75) -> np.ndarray:
    """The matrix (new, old) of cubic convolution (Keys, 1981) where an old pixel is `scale` new ones, edges repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) / scale - 0.5
        for k in range(math.floor(at) - 1, math.floor(at) + 3):
            t = abs(at - k)
            inner = (a + 2) * t**3 - (a + 3) * t**2 + 1
            matrix[i, min(max(k, 0), old - 1)] += inner if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4)
    return matrix


def test_positions_for_another_size_are_resized_as_the_release_does(tmp_path: Path) -> None:
    model = timm_vit(init_values=0.1)
    weights = dict(model.state_dict())
    table = weights["pos_embed"][0, 1:].reshape(6, 6, DIM).double().numpy()
    dinov2 = read(saved(weights, tmp_path), heads=4, image_size=(32, 40))
    rows, columns = cubic_weights(6, 4, 4.1 / 6), cubic_weights(6, 5, 5.1 / 6)
    expected = np.einsum("iy,jx,yxd->ijd", rows, columns, table).reshape(20, DIM)
    np.testing.assert_allclose(dinov2.backbone.pos_embed[0, 1:].detach().numpy(), expected, atol=1e-5)
    assert torch.equal(dinov2.backbone.pos_embed[0, 0], weights["pos_embed"][0, 0])

    weights["register_tokens"] = torch.zeros(1, 2, DIM)
    registers = read(saved(weights, tmp_path), heads=4, image_size=(32, 32)).backbone.pos_embed
    for channel in range(4):  # antialiased, without the tenth of a patch: as Pillow resizes
        image = Image.fromarray(table[..., channel].astype(np.float32)).resize((4, 4), Image.Resampling.BICUBIC)
        found = registers[0, 1:, channel].detach().reshape(4, 4).numpy()
        np.testing.assert_allclose(found, np.asarray(image), atol=1e-5)

    with_positions(model)
    mae = read(saved({**model.state_dict()}, tmp_path), heads=4, layout="mae", image_size=(64, 64))
    np.testing.assert_allclose(mae.backbone.pos_embed[0, 1:].numpy(), sincos(8, DIM), atol=1e-5)


def test_dinov2_is_made_for_224_pixels_unless_asked(tmp_path: Path) -> None:
    model = timm_vit(img_size=518, patch_size=14, init_values=0.1, depth=1)
    file = saved(dict(model.state_dict()), tmp_path)
    assert read(file, heads=4).preprocessing.crop == (224, 224)
    assert read(file, heads=4).preprocessing.resize == 256
    whole = read(file, heads=4, image_size=(518, 518))
    assert torch.equal(whole.backbone.pos_embed, model.pos_embed)


# ---- What is refused.


def spoilt(change: Callable[[dict[str, Tensor]], Any], folder: Path) -> Path:
    weights = {k: v.clone() for k, v in timm_vit(depth=2).state_dict().items()}
    change(weights)
    return saved(weights, folder)


CHANGES: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda w: w.pop("blocks.1.norm2.bias"), r"1 missing: blocks\.1\.norm2\.bias$"),
    (lambda w: w.update({"adapter.weight": torch.zeros(2)}), r"1 unknown: adapter\.weight$"),
    (
        lambda w: w.update({"norm.bias": torch.zeros(3)}),
        r"1 of another shape: norm\.bias \(3,\) instead of \(64,\)$",
    ),
    (
        lambda w: w.update({"blocks.0.attn.relative_position_bias_table": torch.zeros(124, 4)}),
        r"1 missing: blocks\.1\.attn\.relative_position_bias_table; 1 unknown: pos_embed$",
    ),
    (lambda w: w.update({"patch_embed.proj.weight": torch.zeros(DIM, 3, 2, 8, 8)}), "patches of video"),
    (lambda w: w.update({"pos_embed": torch.zeros(1, 32, DIM)}), "position table of 32 rows"),
    (lambda w: w.pop("patch_embed.proj.weight"), "no patch embedding of a known layout"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[words[:24] for _, words in CHANGES])
def test_what_does_not_fit_is_said(change: Callable, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read(spoilt(change, tmp_path), heads=4)


def test_other_rotary_positions_are_refused(tmp_path: Path) -> None:
    timm = import_timm()
    model = timm.create_model("vit_small_patch16_dinov3_qkvb", embed_dim=DIM, depth=1, num_heads=4, num_classes=0)
    weights = dinov3_names(model)
    weights["rope_embed.periods"] = weights["rope_embed.periods"] * 1.1
    with pytest.raises(UserError, match="rotary positions of other periods"):
        read(saved(weights, tmp_path))


def test_heads_that_no_weight_betrays_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="how many attention heads its 64 channels have: add ,heads="):
        read(saved(dict(timm_vit().state_dict()), tmp_path))


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    file = saved({"model": dict(timm_vit().state_dict()), "extra": Bomb(mark)}, tmp_path)
    with pytest.raises(
        UserError,
        match=r"wants posix\.mkdir to be run on reading, and nothing from a file is executed here; where you trust",
    ):
        read(file, heads=4)
    assert not mark.exists()


def test_programs_and_rubbish_are_named(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "program.pt2")
    with pytest.raises(UserError, match="is a program"):
        read(tmp_path / "program.pt2")
    (tmp_path / "rubbish.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"rubbish\.pth"):
        read(tmp_path / "rubbish.pth")
    (tmp_path / "rubbish.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read(tmp_path / "rubbish.safetensors")
    with pytest.raises(UserError, match="holds a list, not weights by name"):
        read(saved([torch.zeros(2)], tmp_path))


# ---- As our export.


def test_an_import_is_exported_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    model = timm_vit(reg_tokens=2, no_embed_class=True, init_values=0.1)
    save_file(dict(model.state_dict()), tmp_path / "weights.safetensors")
    before = torch.get_rng_state()
    encoder = libraries.load(f"torch:{tmp_path / 'weights.safetensors'},heads=4,layout=dinov2,mean=0.5/0.4/0.3")
    assert torch.equal(torch.get_rng_state(), before)
    assert encoder.preprocessing.mean == (0.5, 0.4, 0.3)
    exported.save(tmp_path / "encoder", encoder)
    again = exported.load(tmp_path / "encoder")
    assert again.fingerprint == encoder.fingerprint
    assert again.lineage["left_out"] == []
    with torch.inference_mode():
        assert torch.equal(again(IMAGES).patches, encoder(IMAGES).patches)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from ssl_pretrain.launch.export import main

    model = timm_vit()
    file = str(saved(dict(model.state_dict()) | {"head.weight": torch.zeros(2, 2)}, tmp_path))
    out = tmp_path / "encoder"
    assert (
        main(["import", file, "--out", str(out), "--heads", "4", "--image-size", "48", "--mean", "0.5", "0.4", "0.3"])
        == 0
    )
    said = capsys.readouterr().out
    count = sum(p.numel() for p in model.parameters())
    assert f"dino: vit_base, {count:,} parameters\nleft out (1): head.weight\nwritten: {out}\n" == said
    encoder = exported.load(out)
    check(encoder, tokens(model), 1)
    assert encoder.preprocessing.mean == (0.5, 0.4, 0.3)
    mistakes = {
        ("import", file, "--out", str(out)): "already contains an export",
        ("import", "--out", str(out) + "2"): "name the checkpoint first",
        ("import", file): "--out is needed",
        ("imprt", file): "did you mean import?",
        ("import", str(tmp_path / "gone.pth"), "--out", str(out) + "2"): "does not exist",
    }
    for argv, words in mistakes.items():
        assert main(list(argv)) == 2
        assert words in capsys.readouterr().err
