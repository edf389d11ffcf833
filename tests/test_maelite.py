"""MAE-Lite: both losses and their gradients against NumPy, the teacher's pixels and patches, teachers that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from method_helpers import check_stated, losses_of, make_zero_, tiny_flags
from numpy_oracles import numpy_attention, numpy_patches
from ssl_pretrain.launch.pretrain import main
from ssl_pretrain.methods.maelite import MAELite

from ssl_pretrain import backbones, checkpoint, encoder
from ssl_pretrain.backbones.backbone import Backbone, UnsupportedByBackbone
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import BATCH
from ssl_pretrain.data.views import Sight
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.parts.masked_autoencoder import decoded, masking
from ssl_pretrain.pretext import Batch

KERNELS = 209  # of a step: python tests/kernels.py maelite
DEVICE_KERNELS = 224  # with the optimiser, on an accelerator: python tests/device.py maelite


def parts(method: MAELite, batch: Batch) -> dict[str, Any]:
    """What the losses are made of, float64: the masked patches, the decoder's predictions, the tokens that enter the
    encoder's last block, and the attention of the teacher's, on its own pixels (one_step's numbers)."""
    images, teacher = batch.views["image"], method.teacher.backbone
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    with torch.no_grad():
        keep, masked, grid = masking(method.encoder, images, one_step.step(), method.config.mask_ratio)
        seen = method.encoder(images, keep=keep, blocks=(0,))
        painted = decoded(method, seen, keep, masked, grid)
        there = teacher((batch.views["teacher"] * std + mean - 0.5) / 0.25, keep=keep, blocks=(0,)).blocks[0]
    return {
        "masked": masked.numpy(),
        "painted": painted.double().numpy(),
        "entering": seen.blocks[0].double().numpy(),
        "wanted": numpy_attention(teacher.blocks[1], there.double().numpy()),
    }


@pytest.mark.parametrize("knobs", [{}, {"attention_weight": 30.0, "norm_pix": False, "mask_ratio": 0.75}])
def test_loss_and_gradient_against_numpy(knobs: dict[str, Any]) -> None:
    method = one_step.build("maelite", **knobs).eval()
    assert isinstance(method, MAELite)
    with torch.no_grad():  # attention of fresh weights is nearly uniform
        method.encoder.blocks[1].attn.qkv.weight.mul_(8)
        method.teacher.backbone.blocks[1].attn.qkv.weight.mul_(8)
    config, batch = method.config, one_step.batch(method)
    losses = method(batch, one_step.step())
    losses.total.backward()

    found = parts(method, batch)
    target = numpy_patches(batch.views["image"].double().numpy(), 8)[np.arange(BATCH)[:, None], found["masked"]]
    if config.norm_pix:
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    pixels = ((found["painted"] - target) ** 2).mean((1, 2))
    adapter, block = method.adapter.weight.detach().double().numpy(), method.encoder.blocks[1]
    assert adapter.shape == (3, 4)  # the teacher has three heads, the encoder four

    def difference(moved: np.ndarray | None = None) -> np.ndarray:
        own = numpy_attention(block, found["entering"], moved)
        return np.einsum("ts,bsqk->btqk", adapter, own) - found["wanted"]

    each = (difference() ** 2).mean((1, 2, 3))
    uniform = ((found["wanted"] - 1 / found["wanted"].shape[-1]) ** 2).mean()
    assert uniform > 1e-3
    assert losses.terms["reconstruction"].item() == pytest.approx(pixels.mean(), rel=1e-5)
    assert losses.terms["attention"].item() == pytest.approx(each.mean(), rel=1e-4)
    assert losses.terms["relative"].item() == pytest.approx(each.mean() / uniform, rel=1e-4)
    whole = pixels + config.attention_weight * each
    np.testing.assert_allclose(losses.per_sample, whole, rtol=1e-4)
    assert losses.total.item() == pytest.approx(whole.mean(), rel=1e-5)

    own = numpy_attention(block, found["entering"])
    gradient = config.attention_weight * 2 / difference().size * np.einsum("btqk,bsqk->ts", difference(), own)
    np.testing.assert_allclose(method.adapter.weight.grad, gradient, rtol=1e-3, atol=1e-7)
    gradient = 2 * (found["painted"] - target) / target.size
    np.testing.assert_allclose(method.decoder_pred.bias.grad, gradient.sum((0, 1)), rtol=1e-3, atol=1e-7)
    # The queries of the last block have a part of the gradient from the pixels: take it away.
    of_both = method.encoder.blocks[1].attn.qkv.bias.grad.double().numpy().copy()
    without = one_step.build("maelite", **{**knobs, "attention_weight": 0.0}).eval()
    without.load_state_dict(method.state_dict())
    without(batch, one_step.step()).total.backward()
    of_attention = of_both - without.encoder.blocks[1].attn.qkv.bias.grad.double().numpy()
    for place in np.argsort(-np.abs(of_attention[:128]))[:3]:
        moved = np.eye(len(of_both))[place] * 1e-4
        values = [(difference(sign * moved) ** 2).mean() for sign in (1, -1)]
        quotient = config.attention_weight * (values[0] - values[1]) / 2e-4
        assert of_attention[place] == pytest.approx(quotient, rel=2e-2)


def test_the_teacher_sees_the_patches_that_the_encoder_sees() -> None:
    """Pixels of a masked patch change neither attention; those of a kept patch, in the teacher's view alone, do."""
    method = one_step.build("maelite").eval()
    batch = one_step.batch(method)
    assert batch.views["teacher"].shape[-2:] == (64, 64)  # its patches have 16 pixels, the encoder's 8
    keep, masked, _ = masking(method.encoder, batch.views["image"], one_step.step(), method.config.mask_ratio)

    def attention(patch: int) -> float:
        given = one_step.batch(method)
        row, column = 16 * (patch // 4), 16 * (patch % 4)
        given.views["teacher"][0, :, row : row + 16, column : column + 16] += 2
        with torch.no_grad():
            return method(given, one_step.step()).terms["attention"].item()

    with torch.no_grad():
        before = method(batch, one_step.step()).terms["attention"].item()
    assert attention(int(masked[0, 0])) == before
    assert attention(int(keep[0, 0])) != before


def test_blocks_are_those_of_the_knobs() -> None:
    method = one_step.build("maelite", student_block=0, teacher_block=-2).eval()
    batch = one_step.batch(method)
    images = batch.views["image"]
    losses = method(batch, one_step.step())
    keep, _, _ = masking(method.encoder, images, one_step.step(), method.config.mask_ratio)
    with torch.no_grad():
        own = method.encoder(images, keep=keep, attention_of=(0,)).attention[0]
        wanted = method.teacher(batch.views["teacher"], keep=keep, attention_of=(0,)).attention[0]
        expected = (method.adapted(own) - wanted).square().mean()
    assert losses.terms["attention"].item() == pytest.approx(expected.item(), rel=1e-5)
    losses.total.backward()


def test_collapsed_is_what_it_states() -> None:
    """All tokens attend to all equally, and the adapter averages; the decoder paints zero."""
    method = one_step.build("maelite", mask_ratio=0.5)
    make_zero_(method.encoder.blocks[1].attn.qkv)
    make_zero_(method.decoder_pred)
    torch.nn.init.constant_(method.adapter.weight, 1 / 4)
    losses = losses_of(method)
    check_stated(method, {"relative": losses, "reconstruction": losses})
    assert list(one_step.build("maelite", norm_pix=False).collapsed(BATCH)) == ["relative"]


def test_only_the_adapter_is_beside_what_mae_has_and_no_teacher_is_in_the_state() -> None:
    ours, plain = one_step.build("maelite").state_dict(), one_step.build("mae").state_dict()
    assert set(ours) - set(plain) == {"adapter.weight"}
    assert (
        one_step.build("maelite").exported().state_dict().keys() == one_step.build("mae").exported().state_dict().keys()
    )


def test_drop_path_and_training_mode_leave_the_teacher_alone() -> None:
    method = one_step.build("maelite").train()
    method.teacher.backbone.config = type(method.teacher.backbone.config)(
        **{**method.teacher.backbone.describe(), "drop_path": 0.5}
    )
    batch = one_step.batch(method)
    assert not method.teacher.backbone.training
    assert torch.equal(method(batch, one_step.step()).total, method(batch, one_step.step()).total)


# ---- Teachers and encoders that do not fit.


def teacher(backbone: Backbone) -> dict[str, Frozen]:
    scale = ((0.5,) * 3, (0.25,) * 3)
    made = Frozen(backbone, spec="runs/t", fingerprint="t", sight=Sight(backbone.stride), own=scale, run=scale)
    return {"teacher": made}


def student(**options: Any) -> MAELite:
    encoder = backbones.build("vit_micro", image_size=(32, 32), **{"patch_size": 8, "depth": 2, **options})
    return MAELite(encoder, MAELite.Config(decoder_dim=32, decoder_depth=1, decoder_heads=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"registers": 3}, "runs/t has 4 tokens before the patches .* and the encoder 1"),
        ({"cls": False}, "runs/t has 0 tokens before the patches .* and the encoder 1"),
    ],
)
def test_a_teacher_with_other_tokens_is_refused(options: dict[str, Any], message: str) -> None:
    other = backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=1, **options)
    with pytest.raises(UserError, match=message):
        student().prepare(8, teacher(other))


def test_a_teacher_with_another_grid_is_refused_in_a_line_that_names_both() -> None:
    other = backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=1)
    made = teacher(other)
    made["teacher"].sight = Sight((16, 8))  # as if it were fitted to other patches than it has
    with pytest.raises(UserError, match="runs/t sees an image as 8 x 4 patches and the encoder as 4 x 4"):
        student().prepare(8, made)
    method = one_step.build("maelite")
    batch = one_step.batch(method)
    batch.views["teacher"] = batch.views["teacher"][..., :48]
    with pytest.raises(UserError, match="teacher sees an image as 4 x 3 patches and the encoder as 4 x 4"):
        method(batch, one_step.step())


def test_a_teacher_without_attention_or_without_the_block_is_refused() -> None:
    convolutions = backbones.build("resnet18", image_size=(32, 32))
    with pytest.raises(UserError, match=r"--teacher-block: runs/t gives no attention maps \(ResNet\)"):
        student().prepare(8, teacher(convolutions))
    with pytest.raises(UserError, match="--teacher-block 7: teacher has 2 blocks, -2 to 1"):
        one_step.build("maelite", teacher_block=7)
    with pytest.raises(UserError, match="--student-block -3: the encoder has 2 blocks, -2 to 1"):
        one_step.build("maelite", student_block=-3)
    with pytest.raises(UnsupportedByBackbone, match="maelite needs an encoder that supports 'keep'"):
        MAELite(backbones.build("resnet18", image_size=(32, 32)), MAELite.Config())


@pytest.mark.parametrize("knobs", [{"attention_weight": -1.0}, {"mask_ratio": 0.99}, {"decoder_heads": 5}])
def test_knobs_that_cannot_be(knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--"):
        one_step.build("maelite", **knobs)


def test_a_run_follows_a_teacher_of_another_patch_and_refuses_another_file(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def export(name: str, seed: int, **options: Any) -> Path:
        torch.manual_seed(seed)
        options = {"patch_size": 16, "dim": 96, "heads": 3, **options}
        made = backbones.build("vit_micro", image_size=(32, 32), **options)
        how = Preprocessing.for_size((32, 32), (0.5,) * 3, (0.25,) * 3)
        encoder.save(tmp_path / name, Encoder(made, "vit_micro", how, {}))
        return tmp_path / name

    flags = ["--method", "maelite", "--data", photos, *TINY, *tiny_flags("maelite"), "--no-score", "--workers", 0]

    def run(*words: object) -> tuple[int, str]:
        return main([str(word) for word in (*flags, *words)]), capsys.readouterr().err

    assert run("--teacher", export("a", 0), "--steps", 2, "--out", tmp_path / "run")[0] == 0
    state = checkpoint.load(tmp_path / "run" / "checkpoints", 2)["method"]
    assert state["adapter.weight"].shape[0] == 3
    assert not [name for name in state if "teacher" in name]
    code, said = run("--teacher", export("a", 1), "--steps", 3, "--extend", "--out", tmp_path / "run")
    assert code == 2
    assert "began with another teacher" in said
    registers = export("b", 0, registers=2)
    code, said = run("--teacher", registers, "--steps", 2, "--out", tmp_path / "other")
    assert code == 2
    assert f"--teacher {registers} has 3 tokens before the patches" in said
    assert len([line for line in said.splitlines() if "ssl-pretrain:" in line]) == 1
