"""Attention transfer in fine-tuning: the loss against NumPy, copied attention against the block's definition, the teacher's
pixels, and teachers that do not fit."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy_oracles import numpy_attention
from pixel_tasks import split_task
from small_encoders import small_encoder
from ssl_pretrain.eval import finetune
from ssl_pretrain.eval._attention_transfer import AttentionTransfer, CopiedAttention
from ssl_pretrain.eval._task import Task
from ssl_pretrain.launch.evaluate import main
from synthetic_data import noisy_classes
from torch import Tensor

from ssl_pretrain import backbones
from ssl_pretrain import encoder as exported
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError

CPU = torch.device("cpu")
CONFIG = finetune.Config(epochs=2, lrs=(2e-3,), train_batch_size=32)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def sharp(seed: int = 0, **options: Any) -> Encoder:
    """A small encoder whose attention is far from uniform."""
    made = small_encoder(seed, **options)
    with torch.no_grad():
        for block in made.backbone.blocks:
            block.attn.qkv.weight.mul_(12)
    return made


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """An export with patches of 4 pixels, where the students have 8, and another normalisation."""
    made = sharp(5, patch_size=4, depth=4)
    how = Preprocessing(8, (8, 8), "bicubic", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    backbone = backbones.build("vit_micro", image_size=(8, 8), patch_size=4, dim=32, heads=2, depth=4)
    backbone.load_state_dict(made.backbone.adapt(made.backbone.state_dict(), (16, 16)) | {
        name: value for name, value in backbone.state_dict().items() if name == "pos_embed"
    })  # fmt: skip
    exported.save(tmp_path / "teacher", Encoder(backbone, "vit_micro", how, {}))
    return tmp_path / "teacher"


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    made = split_task(noisy_classes(96, 1, noise=60), noisy_classes(40, 2, noise=60))
    return replace(made, encoder=sharp(), batch_size=64)


def of_teacher(path: Path, student: Encoder, pixels: Tensor) -> tuple[list[np.ndarray], Any]:
    """The tokens that enter each of its blocks, for images in the student's normalisation; and its blocks."""
    made, own = exported.load(path), student.preprocessing
    mean, std = (torch.tensor(value)[:, None, None] for value in (own.mean, own.std))
    theirs = [torch.tensor(value)[:, None, None] for value in (made.preprocessing.mean, made.preprocessing.std)]
    small = torch.nn.functional.interpolate(pixels, size=(8, 8), mode="bilinear", antialias=True)
    view = (small * std + mean - theirs[0]) / theirs[1]
    with torch.no_grad():
        first = made.backbone._embedded(view, None, None)[0]
        outputs = made.backbone(view, blocks=(0, 1)).blocks
    return [each.double().numpy() for each in (first, *outputs)], made.backbone.blocks


def test_the_loss_of_distil_and_its_gradient_against_numpy(teacher: Path) -> None:
    student = sharp()
    transfer = AttentionTransfer(str(teacher), student, "distil", 2, 1.5, CPU)
    x = images()
    features = student.backbone(x, blocks=(0,), **transfer.options)
    loss = transfer.loss(features, x)
    loss.backward()
    entering, blocks = of_teacher(teacher, student, x)
    wanted = [numpy_attention(blocks[i], entering[i]) for i in (0, 1)]
    before = [student.backbone._embedded(x, None, None)[0].detach().double().numpy()]
    before.append(features.blocks[0].detach().double().numpy())

    def of_block(i: int, moved: np.ndarray | None = None) -> float:
        own = numpy_attention(student.backbone.blocks[i], before[i], moved)
        return float(-1.5 * (wanted[i] * np.log(own)).sum(-1).mean())

    assert wanted[0].std() > 0.05
    assert loss.item() == pytest.approx(of_block(0) + of_block(1), rel=1e-4)
    gradient = student.backbone.blocks[1].attn.qkv.bias.grad.double().numpy()
    for place in (0, 17, 40):
        moved = np.eye(96)[place] * 1e-4
        assert gradient[place] == pytest.approx((of_block(1, moved) - of_block(1, -moved)) / 2e-4, rel=1e-2, abs=1e-5)
    assert not gradient[64:].any()  # no values
    assert student.backbone.blocks[2].attn.qkv.weight.grad is None


@pytest.mark.parametrize("scope", ["full", "lora"])
def test_copied_attention_is_that_of_the_teacher_and_the_rest_is_the_students(teacher: Path, scope: str) -> None:
    student = sharp()
    transfer = AttentionTransfer(str(teacher), student, "copy", 2, 1.0, CPU)
    own = copy.deepcopy(student.backbone).eval()
    finetune.prepare(own, replace(CONFIG, scope=scope), torch.Generator().manual_seed(0))
    transfer.attach(own)
    own = copy.deepcopy(own)  # as a moving average is made: it has blocks of its own
    x = images()
    found = own(x, blocks=(0, 1, 2))
    entering, blocks = of_teacher(teacher, student, x)
    with torch.no_grad():
        tokens = student.backbone._embedded(x, None, None)[0]
        for i in (0, 1):
            block = student.backbone.blocks[i]
            weights = torch.from_numpy(numpy_attention(blocks[i], entering[i])).float()
            value = block.attn.qkv(block.norm1(tokens))[..., 64:].unflatten(2, (2, 16)).transpose(1, 2)
            tokens = tokens + block.attn.proj((weights @ value).transpose(1, 2).flatten(2))
            tokens = tokens + block.mlp(block.norm2(tokens))
            torch.testing.assert_close(found.blocks[i], tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.blocks[2], student.backbone.blocks[2](tokens), rtol=1e-4, atol=1e-4)
    if scope == "full":
        found.pooled.square().sum().backward()
        gradient = own.blocks[0].attn.qkv.weight.grad
        assert not gradient[:64].any()  # queries and keys are not used
        assert gradient[64:].any()
        assert own.blocks[2].attn.qkv.weight.grad[:64].any()


def test_copying_from_itself_changes_nothing(tmp_path: Path) -> None:
    student = sharp(positions="relative", qk_norm=True, registers=2)
    exported.save(tmp_path / "own", student)
    transfer = AttentionTransfer(str(tmp_path / "own"), student, "copy", 3, 1.0, CPU)
    same = copy.deepcopy(student.backbone)
    transfer.attach(same)
    assert isinstance(same.blocks[2].attn, CopiedAttention)
    with torch.no_grad():
        for options in ({}, {"pooled_only": True}):
            torch.testing.assert_close(
                same(images(), **options).pooled, student.backbone(images(), **options).pooled, rtol=1e-4, atol=1e-5
            )
    assert same.state_dict().keys() == student.backbone.state_dict().keys()


def test_distil_brings_the_attention_near_that_of_the_teacher(task: Task, teacher: Path) -> None:
    transfer = AttentionTransfer(str(teacher), task.encoder, "distil", 2, 3.0, CPU)
    config = replace(CONFIG, epochs=8, layer_decay=1.0, drop_path=0.0)
    rows = np.arange(96)
    apart = []
    for each in (None, transfer):
        tuned = finetune._train(task, config, rows, 2e-2, "", transfer=each).encoder.backbone
        with torch.no_grad():
            apart.append(transfer.loss(tuned(images(16), **transfer.options), images(16)).item())
    with torch.no_grad():
        start = transfer.loss(task.encoder.backbone(images(16), **transfer.options), images(16)).item()
    assert apart[1] < 0.9 * min(apart[0], start)


@pytest.mark.parametrize("mode", ["distil", "copy"])
def test_results_name_the_teacher(task: Task, teacher: Path, mode: Any) -> None:
    config = replace(CONFIG, attention_from=str(teacher), attention_mode=mode, ema=0.5, attention_weight=2.0)
    outcome = finetune.evaluate(task, config)
    said = outcome.protocol["attention_from"]
    assert said.pop("fingerprint") == exported.load(teacher).fingerprint
    weight = {"weight": 2.0} if mode == "distil" else {}
    assert said == {
        "encoder": str(teacher),
        "mode": mode,
        "blocks": 2,
        **weight,
    }  # three quarters of three, rounded down
    assert f"attention by {mode}" in outcome.protocol["headline"]
    plain = finetune.evaluate(task, replace(config, attention_from=None))
    assert "attention_from" not in plain.protocol


def test_the_command(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    exported.save(tmp_path / "run", small_encoder())
    flags = ["--data", "fractals:classes=3,images=24", "--epochs", "1", "--train-batch-size", "8", "--workers", "0"]
    words = ["--encoder", "random", "--like", "run", "--attention-from", str(teacher), "--attention-mode", "copy"]
    assert main(["finetune", *words, *flags, "--out", "out"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["protocol"]["attention_from"]["mode"] == "copy"


def fits(path: Path, made: Encoder, student: Encoder, blocks: int | None = None) -> None:
    exported.save(path, made)
    AttentionTransfer(str(path), student, "copy", blocks, 1.0, CPU)


def test_teachers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    student, path = small_encoder(), tmp_path / "t"
    cases: list[tuple[Encoder, Encoder, int | None, str]] = [
        (small_encoder(heads=4), student, None, "has 4 attention heads and the encoder 2"),
        (small_encoder(registers=1), student, None, "has 2 x 2 patches and 2 other tokens where the encoder has 2 x 2 "
         "patches and 1 other tokens"),
        (small_encoder(depth=1), student, 2, "has 1 blocks, and 2 of vit_micro are to get their attention"),
        (small_encoder(in_chans=1), student, None, "takes images of 1 channels, and the encoder of 3"),
        (student, student, 4, "--attention-blocks 4: vit_micro has 3 blocks"),
    ]  # fmt: skip
    for made, own, blocks, message in cases:
        with pytest.raises(UserError, match=message):
            fits(path, made, own, blocks)
    convolutions = backbones.build("resnet18", image_size=(16, 16), stem="small")
    other = Encoder(convolutions, "resnet18", student.preprocessing, {})
    with pytest.raises(UserError, match=r"gives no attention maps \(ResNet\)"):
        fits(path, other, student)
    with pytest.raises(UserError, match=r"--attention-from: resnet18 is no ViT of this package"):
        fits(path, student, other)
    fits(path, student, student)


def test_an_encoder_with_copied_attention_is_not_saved(task: Task, teacher: Path) -> None:
    config = replace(CONFIG, attention_from=str(teacher), attention_mode="copy", save=True)
    with pytest.raises(UserError, match="--save: an encoder with copied attention"):
        finetune.evaluate(task, config)
    with pytest.raises(UserError, match="--attention-weight is -1"):
        finetune.evaluate(task, replace(CONFIG, attention_weight=-1.0))
