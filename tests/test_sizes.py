"""Sizes of a method's parts: the paper's for the paper's encoders and data, smaller ones for less; decided once a run."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from ssl_pretrain.launch import pretrain

from ssl_pretrain import backbones, pretext
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.parts import sizes

IMAGENET = 1_281_167
# What the papers give, for ImageNet-1k: the sizes by method.
PAPER: dict[str, dict[str, int]] = {
    "aim": {"head_dim": 2048, "head_depth": 12},
    "barlow": {"projector_dim": 8192},
    "byol": {"hidden_dim": 4096},
    "data2vec2": {"decoder_depth": 6},
    "dino": {"prototypes": 65536, "hidden_dim": 2048},
    "dinov2": {"prototypes": 65536, "hidden_dim": 2048},
    "distill": {"queue": 8192},
    "g2sd": {"decoder_dim": 512, "decoder_depth": 4, "decoder_heads": 16},
    "ibot": {"prototypes": 8192, "hidden_dim": 2048},
    "ijepa": {"predictor_dim": 384, "predictor_depth": 12, "predictor_heads": 12},
    "lejepa": {"hidden_dim": 2048},
    "mae": {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16},
    "mage": {"decoder_depth": 8, "decoder_heads": 16},
    "mocov3": {"hidden_dim": 4096},
    "maelite": {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16},
    "mrmae": {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16},
    "msn": {"prototypes": 1024, "hidden_dim": 2048},
    "mvmr": {"projector_dim": 8192},
    "nnclr": {"queue": 98304, "hidden_dim": 2048, "predictor_dim": 4096},
    "npid": {"negatives": 4096},
    "semaim": {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16},
    "simclr": {"hidden_dim": 2048},
    "simsiam": {"hidden_dim": 2048, "embedding_dim": 2048, "bottleneck_dim": 512},
    "spark": {"decoder_dim": 768},
    "swav": {"prototypes": 3000, "hidden_dim": 2048},
    "vicreg": {"projector_dim": 8192},
    "vqtok": {"codes": 8192, "decoder_dim": 768, "decoder_heads": 12},
}
TRANSFORMERS = {
    "aim",
    "data2vec2",
    "g2sd",
    "ijepa",
    "mae",
    "maelite",
    "mage",
    "mrmae",
    "semaim",
    "vqtok",
}  # of which no paper has a convnet
WITH_VIT_SMALL = {"dino", "ibot", "msn", "mocov3"}  # whose papers train a ViT-S with these sizes


def by_rule(method: str, encoder: str, images: int | None, **knobs: Any) -> dict[str, Any]:
    """All knobs, with the open ones decided."""
    kind = pretext.load(method)
    return dataclasses.asdict(kind.sized(kind.Config(**knobs), outline(encoder), images))


@functools.cache
def outline(encoder: str) -> Backbone:
    """An encoder without weights."""
    with torch.device("meta"):
        return backbones.build(encoder, image_size=(64, 64), **({"patch_size": 8} if "vit" in encoder else {}))


@pytest.mark.parametrize("method", PAPER)
def test_encoders_of_the_papers_keep_the_papers_sizes(method: str) -> None:
    encoders = ["vit_base", "vit_large", "vit_giant"]
    encoders += [] if method in TRANSFORMERS else ["resnet50"]
    encoders += ["vit_small"] if method in WITH_VIT_SMALL else []
    for encoder in encoders:
        for images in (IMAGENET, 14_000_000, None):
            found = by_rule(method, encoder, images)
            assert {name: found[name] for name in PAPER[method]} == PAPER[method], (encoder, images)


def test_no_other_knob_is_left_open() -> None:
    for method in (file.stem for file in (ROOT / "methods").glob("[a-z]*.py")):
        kind = pretext.load(method)
        open_knobs = {field.name for field in dataclasses.fields(kind.Config) if field.default is None}
        assert open_knobs == set(PAPER.get(method, {})), method


@pytest.mark.parametrize("method", PAPER)
def test_given_knobs_are_unchanged(method: str) -> None:
    given = dict.fromkeys(PAPER[method], 64)
    found = by_rule(method, "vit_micro", 100, **given)
    assert {name: found[name] for name in given} == given


def test_sizes_beside_small_encoders() -> None:
    """By hand: 512 x 128 / 768 = 85.3, the nearest multiple of 32 is 96; 8 x 4 / 12 = 2.7; 96 / 32 = 3 heads."""
    micro = by_rule("mae", "vit_micro", 2000)
    assert (micro["decoder_dim"], micro["decoder_depth"], micro["decoder_heads"]) == (96, 2, 3)
    small = by_rule("mae", "vit_small", 2000)
    assert (small["decoder_dim"], small["decoder_depth"], small["decoder_heads"]) == (256, 8, 8)
    g2sd = [by_rule("g2sd", f"vit_{size}", 2000) for size in ("small", "tiny", "micro")]
    assert [tuple(each[f"decoder_{part}"] for part in ("dim", "depth", "heads")) for each in g2sd] == [
        (256, 4, 8),  # the paper's width and depth for a ViT-S, and of the next for a ViT-Ti
        (128, 4, 4),
        (96, 1, 3),
    ]
    given = by_rule("mae", "vit_micro", 2000, decoder_dim=40)
    assert given["decoder_heads"] == 1  # 40 // 32
    ijepa = by_rule("ijepa", "vit_tiny", 2000)
    assert (ijepa["predictor_dim"], ijepa["predictor_depth"], ijepa["predictor_heads"]) == (96, 12, 3)
    assert by_rule("spark", "convnextv2_base", None, decoder="fcmae")["decoder_dim"] == 512
    assert by_rule("spark", "resnet_micro", 2000)["decoder_dim"] == 128
    assert by_rule("barlow", "vit_tiny", 2000)["projector_dim"] == 2048
    assert by_rule("byol", "resnet18", 2000)["hidden_dim"] == 2688  # 4096 x 512 / 768 = 2730.7 = 21.3 x 128


def test_prototypes_and_queues_of_few_images() -> None:
    """By hand: 65536 x 50000 / 1281167 = 2558, in powers of two 2048; 50000 / 2 = 25000, below it 16384."""
    assert by_rule("dino", "vit_base", 50_000)["prototypes"] == 2048
    assert by_rule("dino", "vit_base", 2000)["prototypes"] == 128  # not 102
    assert by_rule("swav", "vit_base", 200_000)["prototypes"] == 512  # 468
    assert by_rule("nnclr", "vit_base", 50_000)["queue"] == 16384
    assert by_rule("npid", "vit_base", 2000)["negatives"] == 256  # below 500
    assert by_rule("npid", "vit_base", 1)["negatives"] == 1


@pytest.mark.parametrize("width", [1, 3, 4, 31, 32, 36, 70, 96, 512, 1000])
def test_heads_divide_the_width(width: int) -> None:
    count = sizes.heads(16, width, 128)
    assert width % count == 0
    assert count == 1 or width // count >= 32
    assert sizes.heads(16, width, 768) == 16


def test_the_parts_of_the_methods_are_smaller_than_a_small_encoder_needs() -> None:
    """MAE with a vit_micro on images of 64 pixels: 1.1 million parameters in all, instead of 26 million."""
    kind = pretext.load("mae")
    method = kind(backbones.build("vit_micro", image_size=(64, 64), patch_size=16), kind.Config())
    assert sum(p.numel() for p in method.parameters()) < 1.3e6


def test_a_run_records_its_sizes_and_resumes_with_the_recorded_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """tests/old_run was begun with sizes that no rule gives (its command is in test_old_run.py)."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "old_run", run)
    (run / "expected.safetensors").unlink()
    words = (
        "--out run --workers 0 --no-score --method mae --data fractals:classes=4,images=64 --encoder vit_micro --dim 16 "
        "--heads 1 --depth 1 --patch-size 8 --batch-size 8 --steps 6 --checkpoint-every 3 --log-every 1 "
        "--monitor-every 0 --picture-every 0 --precision fp32 --lr 1e-3 --recompute"
    ).split()
    # Recipe.small gives sizes to runs on fractals; "none" leaves them open
    words += ["--decoder-dim", "none", "--decoder-depth", "none", "--decoder-heads", "none"]
    assert pretrain.main(words) == 0
    assert "continuing from step 3 of 6" in capsys.readouterr().err
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert [recorded[f"decoder_{part}"] for part in ("dim", "depth", "heads")] == [16, 1, 1]

    shutil.rmtree(run)
    assert pretrain.main([*words, "--steps", "1"]) == 0
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert [recorded[f"decoder_{part}"] for part in ("dim", "depth", "heads")] == [32, 1, 1]

    (run / "config.yaml").write_text(yaml.safe_dump({**recorded, "decoder_dim": "wide"}))
    capsys.readouterr()
    assert pretrain.main([*words, "--steps", "1"]) == 2
    assert "config.yaml is not what the run wrote (decoder_dim: 'wide'" in capsys.readouterr().err
