"""G2SD: loss and gradient against NumPy, the teacher's pixels, patches and block, teachers that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from method_helpers import check_stated, losses_of, make_zero_, step, tiny_flags
from numpy_oracles import numpy_attention
from ssl_pretrain.methods.g2sd import G2SD
from ssl_pretrain.methods.mae import MAE

from ssl_pretrain import backbones, checkpoint
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.backbones.positions import sincos_table
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import BATCH, OWN
from ssl_pretrain.data.views import Sight
from ssl_pretrain.errors import UserError
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.parts.masked_autoencoder import decoded, decoder_tokens, masking

KERNELS = 242  # of a step: python tests/kernels.py g2sd
DEVICE_KERNELS = 242  # with the optimiser, on an accelerator: python tests/device.py g2sd
RUN = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))  # mean and std of one_step's views


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def erf(x: np.ndarray) -> np.ndarray:
    return torch.erf(torch.from_numpy(x)).numpy()


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def layer_norm(x: np.ndarray, module: Any = None) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x if module is None else x * array(module.weight) + array(module.bias)


def linear(x: np.ndarray, module: Any) -> np.ndarray:
    return x @ array(module.weight).T + array(module.bias)


def numpy_block(block: Any, x: np.ndarray) -> np.ndarray:
    """A pre-norm transformer block."""
    attention = numpy_attention(block, x)
    value = np.split(linear(layer_norm(x, block.norm1), block.attn.qkv), 3, axis=-1)[2]
    heads = np.split(value, block.attn.heads, axis=-1)
    mixed = np.concatenate([attention[:, i] @ head for i, head in enumerate(heads)], axis=-1)
    x = x + linear(mixed, block.attn.proj)
    return x + linear(gelu(linear(layer_norm(x, block.norm2), block.mlp.fc1)), block.mlp.fc2)


def numpy_decoder(method: Any, seen: np.ndarray, keep: np.ndarray, masked: np.ndarray, blocks: int) -> np.ndarray:
    """The tokens after so many blocks of a decoder, from encoder tokens (B, 1 + K, D): masked, class token, kept. The
    paper's order: mask tokens are put in their places, then positions are added; the class token has none."""
    grid = (4, 4)
    table = array(sincos_table(grid, method.decoder_embed.out_features))
    x = linear(seen, method.decoder_embed)
    out = []
    for image in range(len(x)):
        places = np.repeat(array(method.mask_token)[0], 16, axis=0)
        places[keep[image]] = x[image, 1:]
        out.append(np.concatenate([x[image, :1], places + table]))
    tokens = np.stack(out)
    for block in list(method.decoder_blocks)[:blocks]:
        tokens = numpy_block(block, tokens)
    rows = np.arange(len(x))[:, None]
    return np.concatenate([tokens[rows, 1 + masked], tokens[:, :1], tokens[rows, 1 + keep]], axis=1)


def smooth_l1(difference: np.ndarray, beta: float) -> np.ndarray:
    size = np.abs(difference)
    return np.where(size < beta, 0.5 * size**2 / beta, size - beta / 2)


def by_hand(method: G2SD, batch: Any, blocks: int) -> dict[str, np.ndarray]:
    """What the loss is made of. The teacher sees its own pixels: those of the view, in [0, 1], and then normalised."""
    images, teacher = batch.views["image"], method.teacher.method
    pixels = array(batch.views["teacher"]) * np.reshape(RUN[1], (3, 1, 1)) + np.reshape(RUN[0], (3, 1, 1))
    own = (pixels - np.reshape(OWN[0], (3, 1, 1))) / np.reshape(OWN[1], (3, 1, 1))
    with torch.no_grad():
        keep, masked, _ = masking(method.encoder, images, one_step.step(), method.config.mask_ratio)
        mine = array(method.encoder(images, keep=keep).tokens)
        theirs = array(teacher.encoder(torch.from_numpy(own).float(), keep=keep).tokens)
    keep, masked = keep.numpy(), masked.numpy()
    wanted = layer_norm(numpy_decoder(teacher, theirs, keep, masked, blocks))
    normed = layer_norm(numpy_decoder(method, mine, keep, masked, len(method.decoder_blocks)), method.decoder_norm)
    hidden = gelu(linear(normed, method.predictor[0]))
    if method.config.supervise == "masked":
        wanted, hidden = wanted[:, : masked.shape[1]], hidden[:, : masked.shape[1]]
    return {"wanted": wanted, "hidden": hidden, "difference": linear(hidden, method.predictor[2]) - wanted}


@pytest.mark.parametrize(
    ("knobs", "blocks"),
    [
        ({}, 1),
        ({"target_block": -1, "supervise": "masked", "mask_ratio": 0.75}, 2),
        ({"target_block": 0, "beta": 0.5}, 1),
    ],
)
def test_loss_and_gradient_against_numpy(knobs: dict[str, Any], blocks: int) -> None:
    """Forward: both decoders and the loss. Backward: the last layer of the MLP in closed form."""
    method = one_step.build("g2sd", **knobs).eval()
    assert isinstance(method, G2SD)
    with torch.no_grad():
        method.predictor[2].weight.mul_(5)  # so that differences lie on both sides of beta
    batch, beta = one_step.batch(method), method.config.beta
    losses = method(batch, one_step.step())
    losses.total.backward()
    found = by_hand(method, batch, blocks)
    difference = found["difference"]
    assert (np.abs(difference) > beta).mean() > 1e-3
    assert (np.abs(difference) < beta).mean() > 0.1
    each = smooth_l1(difference, beta).mean((1, 2))
    np.testing.assert_allclose(losses.per_sample, each, rtol=1e-5)
    assert losses.total.item() == pytest.approx(each.mean(), rel=1e-5)
    constant = smooth_l1(found["wanted"] - found["wanted"].mean((0, 1)), beta).mean()
    assert losses.terms["relative"].item() == pytest.approx(each.mean() / constant, rel=1e-5)

    slope = np.clip(difference / beta, -1, 1) / difference.size
    gradient = np.einsum("blt,blh->th", slope, found["hidden"])
    np.testing.assert_allclose(method.predictor[2].weight.grad, gradient, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(method.predictor[2].bias.grad, slope.sum((0, 1)), rtol=1e-3, atol=1e-7)


def test_targets_of_a_teacher_of_another_patch_and_normalisation_are_those_of_its_own_pixels() -> None:
    method = one_step.build("g2sd").eval()
    batch = one_step.batch(method)
    assert batch.views["teacher"].shape[-2:] == (64, 64)  # patches of 16 pixels, the encoder's have 8
    keep, masked, grid = masking(method.encoder, batch.views["image"], one_step.step(), 0.5)
    found = method.targets(batch.views["teacher"], keep, masked, grid)
    assert found.shape == (BATCH, 17, 48)
    assert not found.requires_grad
    wanted = by_hand(method, batch, 1)["wanted"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    method.teacher._scale = None  # the comparison would see a normalisation that is left out
    assert np.abs(method.targets(batch.views["teacher"], keep, masked, grid).numpy() - wanted).max() > 1e-2


def test_the_teacher_sees_the_patches_that_the_encoder_sees() -> None:
    method = one_step.build("g2sd").eval()
    images = one_step.batch(method).views["image"]
    keep, masked, _ = masking(method.encoder, images, one_step.step(), method.config.mask_ratio)

    def loss(patch: int | None) -> float:
        given = one_step.batch(method)
        if patch is not None:
            row, column = 16 * (patch // 4), 16 * (patch % 4)
            given.views["teacher"][0, :, row : row + 16, column : column + 16] += 2
        with torch.no_grad():
            return method(given, one_step.step()).total.item()

    assert loss(int(masked[0, 0])) == loss(None)
    assert loss(int(keep[0, 0])) != loss(None)


def test_decoder_tokens_are_those_that_predictions_are_made_of() -> None:
    """The masked ones after the last block, with norm and last layer, are what `decoded` gives for MAE."""
    method = one_step.build("mae", decoder_depth=3).eval()
    images = one_step.batch(method).views["image"]
    with torch.no_grad():
        keep, masked, grid = masking(method.encoder, images, one_step.step(), 0.75)
        seen = method.encoder(images, keep=keep)
        expected = decoded(method, seen, keep, masked, grid)
        tokens = decoder_tokens(method, seen, keep, masked, grid, 2)
        assert tokens.shape == (BATCH, 17, 32)
        found = method.decoder_pred(method.decoder_norm(tokens[:, : masked.shape[1]]))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        earlier = decoder_tokens(method, seen, keep, masked, grid, 1)
        torch.testing.assert_close(method.decoder_blocks[2](earlier), tokens)


def test_collapsed_is_what_it_states() -> None:
    method = one_step.build("g2sd")
    make_zero_(method.predictor[2])
    batch = one_step.batch(method)
    keep, masked, grid = masking(method.encoder, batch.views["image"], step(), method.config.mask_ratio)
    with torch.no_grad():
        method.predictor[2].bias.copy_(method.targets(batch.views["teacher"], keep, masked, grid).mean((0, 1)))
    check_stated(method, {"relative": losses_of(method)})


def test_nothing_of_the_teacher_is_in_the_state_and_training_leaves_it_alone() -> None:
    method = one_step.build("g2sd").train()
    own, plain = method.state_dict(), one_step.build("mae").state_dict()
    predictor = {f"predictor.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    assert {name for name in own.keys() - plain.keys() if not name.startswith("decoder_blocks.1.")} == predictor
    assert plain.keys() - own.keys() == {"decoder_pred.weight", "decoder_pred.bias"}
    teacher = method.teacher.method
    assert not any(module.training for module in teacher.modules())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in method.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())


# ---- Teachers and encoders that do not fit.


def teacher(depth: int = 8, **options: Any) -> dict[str, Frozen]:
    backbone = backbones.build("vit_micro", image_size=(32, 32), **{"patch_size": 8, "depth": 1, **options})
    method = MAE(backbone, MAE.Config(decoder_dim=32, decoder_depth=depth, decoder_heads=2))
    sight = Sight(backbone.stride)
    made = Frozen(backbone, spec="runs/t", fingerprint="t", sight=sight, own=OWN, run=OWN, method=method)
    return {"teacher_run": made}


def student(**knobs: Any) -> G2SD:
    encoder = backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=2)
    small = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "predictor_dim": 24}
    return G2SD(encoder, G2SD.Config(**{**small, **knobs}))


@pytest.mark.parametrize(("depth", "block"), [(8, 3), (4, 1), (3, 0), (1, 0)])
def test_the_middle_is_the_fourth_of_eight_blocks(depth: int, block: int) -> None:
    method = student()
    method.prepare(8, teacher(depth))
    assert method.block == block


def test_a_block_that_the_decoder_has_not_is_refused() -> None:
    for block in (3, -4):
        with pytest.raises(UserError, match=f"--target-block {block}: the decoder of runs/t has 3 blocks, -3 to 2"):
            student(target_block=block).prepare(8, teacher(3))
    method = student(target_block=-3)
    method.prepare(8, teacher(3))
    assert method.block == 0


def test_a_teacher_with_other_tokens_is_refused_unless_masked_patches_alone_are_supervised() -> None:
    for options, count in (({"registers": 3}, 4), ({"cls": False}, 0)):
        with pytest.raises(UserError, match=f"runs/t has {count} tokens before the patches .* and the encoder 1"):
            student().prepare(8, teacher(**options))
        student(supervise="masked").prepare(8, teacher(**options))


def test_a_teacher_with_another_grid_is_refused_in_a_line_that_names_both() -> None:
    made = teacher()
    made["teacher_run"].sight = Sight((16, 8))  # as if it were fitted to other patches than it has
    with pytest.raises(UserError, match="runs/t sees an image as 8 x 4 patches and the encoder as 4 x 4"):
        student().prepare(8, made)
    method = one_step.build("g2sd")
    batch = one_step.batch(method)
    batch.views["teacher"] = batch.views["teacher"][..., :48]
    with pytest.raises(UserError, match="sees an image as 4 x 3 patches and the encoder as 4 x 4"):
        method(batch, one_step.step())


def test_a_network_without_a_decoder_or_an_encoder_that_cannot_drop_tokens_is_refused() -> None:
    made = teacher()
    made["teacher_run"].method = None
    with pytest.raises(UserError, match="runs/t has no decoder of masked patches: give a run of mae"):
        student().prepare(8, made)
    with pytest.raises(UnsupportedByBackbone, match="g2sd needs an encoder that supports 'keep'"):
        G2SD(backbones.build("resnet18", image_size=(32, 32)), G2SD.Config())


@pytest.mark.parametrize(
    "knobs",
    [{"beta": 0.0}, {"mask_ratio": 0.99}, {"decoder_heads": 5}, {"predictor_dim": 0}, {"crop_scale": (1.0, 0.2)}],
)
def test_knobs_that_cannot_be(knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--"):
        student(**knobs)


def test_a_run_follows_a_run_and_refuses_an_export_and_a_changed_teacher(pretrain, photos, tmp_path: Path) -> None:
    short = ["--data", photos, *TINY, "--no-score", "--workers", 0]
    pretrain("--method", "mae", *short, "--dim", 192, "--heads", 6, "--steps", 2, "--checkpoint-every", 1,
             "--out", tmp_path / "mae")  # fmt: skip
    flags = ["--method", "g2sd", *short, *tiny_flags("g2sd"), "--steps", 2]
    pretrain(*flags, "--teacher", tmp_path / "mae", "--out", tmp_path / "run")
    state = checkpoint.load(tmp_path / "run" / "checkpoints", 2)["method"]
    assert not [name for name in state if "teacher" in name]
    # Bytes of a checkpoint: the state and two moments of what is trained, and nothing like the teacher's 2 MB.
    files = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / "step-00000002").iterdir())
    assert files < 3 * 4 * sum(value.numel() for value in state.values()) + 100_000
    assert sum(v.numel() for v in checkpoint.load(tmp_path / "mae" / "checkpoints", 2)["method"].values()) > 500_000

    export = tmp_path / "mae" / "encoder"
    said = pretrain(*flags, "--teacher", export, "--out", tmp_path / "other", code=2).stderr
    assert f"--teacher {export} is an export, which holds an encoder alone" in said
    assert len([line for line in said.splitlines() if "ssl-pretrain:" in line]) == 1
    assert not (tmp_path / "other").exists()

    longer = [
        "--method",
        "mae",
        *short,
        "--dim",
        192,
        "--heads",
        6,
        "--steps",
        3,
        "--extend",
        "--out",
        tmp_path / "mae",
    ]
    pretrain(*longer)  # its newest checkpoint is now another one
    more = [*flags[:-1], 3, "--extend", "--teacher", tmp_path / "mae", "--out", tmp_path / "run"]
    assert "began with another teacher" in pretrain(*more, code=2).stderr
    recorded = yaml.safe_load((tmp_path / "run" / "manifest.json").read_text())["networks"]
    assert list(recorded) == ["teacher"]
