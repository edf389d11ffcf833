"""SparK and FCMAE: loss and gradient against float64 NumPy, the decoders against the papers' layers written out, what is
not visible against noise, and two processes against one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_helpers import check_stated, losses_of, make_zero_
from numpy_oracles import numpy_patches
from spark_helpers import ENCODERS, a_batch, build, images, step
from ssl_pretrain.methods.spark import SparK
from torch import Tensor, nn

from ssl_pretrain import backbones
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.backbones.masked_convolution import Visible
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.dense_decoders import BlockDecoder, UNetDecoder

KERNELS = 402  # of a step: python tests/kernels.py spark
DEVICE_KERNELS = 413  # with the optimiser, on an accelerator: python tests/device.py spark
every_decoder = pytest.mark.parametrize("decoder", ["unet", "fcmae"])
every_encoder = pytest.mark.parametrize("encoder", ENCODERS)


def pixels_of(units: Tensor) -> Tensor:
    """(B, 24) bool as pixels (B, 3, H, W)."""
    block = np.ones((8, 8), bool)
    whole = np.stack([np.kron(each, block) for each in units.unflatten(1, (4, 6)).numpy()])
    return torch.from_numpy(whole)[:, None].expand(-1, 3, -1, -1)


# ---- The loss.


def test_the_released_counts() -> None:
    """SparK keeps round(49 * 0.4) = 20 of 7 x 7 units, FCMAE int(49 * 0.4) = 19."""
    assert [build(decoder=decoder).kept(49) for decoder in ("unet", "fcmae")] == [20, 19]
    assert [build().kept(units) for units in (16, 24)] == [6, 10]


@every_decoder
@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_and_gradient_against_numpy(decoder: str, norm_pix: bool) -> None:
    method, x = build(decoder=decoder, norm_pix=norm_pix), images()
    found = method(a_batch(x), step())
    found.total.backward()
    with torch.no_grad():
        embedded = method.embed(a_batch(x), step())
        predicted = method.reconstruct(embedded)
    target = numpy_patches(x.numpy(), 8)
    if norm_pix:
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    # The paper's form: over the units that are not active, their sum over their number.
    mask = 1.0 - embedded["visible"].double().numpy()
    full = np.zeros_like(target)
    for i in range(4):
        full[i, embedded["masked"][i].numpy()] = predicted[i].numpy()
    squares = ((full - target) ** 2).mean(-1)
    assert float(found.total.detach()) == pytest.approx((squares * mask).sum() / mask.sum(), rel=1e-5)
    np.testing.assert_allclose(found.per_sample.numpy(), (squares * mask).sum(1) / mask.sum(1), rtol=1e-5)
    gradient = (2 * (full - target) * mask[..., None] / (mask.sum() * target.shape[-1])).sum((0, 1))
    gradient = gradient if decoder == "fcmae" else gradient.reshape(64, 3).sum(0)  # one bias for all pixels
    np.testing.assert_allclose(method.decoder.proj.bias.grad.numpy(), gradient, rtol=1e-4, atol=1e-7)


def test_every_unit_is_masked_equally_often() -> None:
    method, draws = build(size=(32, 32)), 4000
    visible, masked = method.masks(torch.zeros(draws, 3, 32, 32), step(draws))
    assert (visible.sum(1) == 6).all()
    assert masked.shape == (draws, 10)
    assert not visible.gather(1, masked).any()
    share = 6 / 16
    assert (visible.float().mean(0) - share).abs().max() < 4.5 * np.sqrt(share * (1 - share) / draws)


@every_encoder
@every_decoder
def test_the_prediction_does_not_see_what_is_masked_nor_the_loss_what_is_visible(encoder: str, decoder: str) -> None:
    """Exactly, in training, where batch norms have statistics of the batch."""
    method, x = build(encoder, decoder=decoder, norm_pix=False).train(), images()
    visible = method.embed(a_batch(x), step())["visible"]
    shown = pixels_of(visible)
    noise = images(seed=3)

    def predicted(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return method.reconstruct(method.embed(a_batch(pixels), step()))

    before = predicted(x)
    assert torch.equal(predicted(torch.where(shown, x, noise)), before)
    assert not torch.equal(predicted(torch.where(shown, noise, x)), before)

    pixels = x.clone().requires_grad_()
    method.reconstruct(method.embed(a_batch(pixels), step())).square().sum().backward()
    assert pixels.grad is not None
    assert not pixels.grad[~shown].any()
    assert pixels.grad[shown].any()

    make_zero_(method.decoder.proj)  # a constant painting: only the target depends on the image
    still = method(a_batch(x), step()).total
    assert torch.equal(method(a_batch(torch.where(shown, noise, x)), step()).total, still)
    assert not torch.equal(method(a_batch(torch.where(shown, x, noise)), step()).total, still)


@every_encoder
def test_running_statistics_do_not_depend_on_what_is_masked(encoder: str) -> None:
    shown, states = None, []
    for seed in (0, 5, 6):
        method = build(encoder).train()
        x = images()
        shown = pixels_of(method.embed(a_batch(x), step())["visible"]) if shown is None else shown
        method = build(encoder).train()
        method(a_batch(torch.where(shown, x, images(seed=seed))), step())
        states.append(method.state_dict())
    changed = [n for n, v in states[0].items() if n.endswith("running_mean") and v.any()]
    assert any(n.startswith("decoder.") for n in changed)
    assert any(n.startswith("encoder.") for n in changed) == (encoder == "resnet_micro")
    for state in states[1:]:
        assert all(torch.equal(value, state[n]) for n, value in states[0].items())


# ---- The decoders, layer by layer.


@every_encoder
@torch.no_grad()
def test_the_unet_is_the_papers(encoder: str) -> None:
    method, x = build(encoder).train(), images()
    decoder = method.decoder
    assert isinstance(decoder, UNetDecoder)
    for i, parameter in enumerate(decoder.parameters()):  # none hides behind a 0 or a 1
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        parameter.copy_(0.2 * noise + (0.5 if parameter.ndim == 1 else 0))
    embedded = method.embed(a_batch(x), step())
    maps = [embedded[f"map{i}"] for i in range(4)]
    units = Visible(embedded["visible"].unflatten(1, (4, 6)))
    found = decoder(maps, units)

    def batch_norm(norm: Any, y: Tensor) -> Tensor:
        return F.batch_norm(y, None, None, norm.weight, norm.bias, True, 0.1, 1e-5)

    y: Any = 0.0
    for i, x_i in enumerate(reversed(maps)):
        dense, side = decoder.densify[i], 2**i
        active = np.stack([np.kron(each, np.ones((side, side))) for each in embedded["visible"].view(4, 4, 6).numpy()])
        active = torch.from_numpy(active).bool()
        rows = x_i.permute(0, 2, 3, 1)[active]
        if encoder == "resnet_micro":
            rows = batch_norm(dense.norm, rows)
        elif i > 0:  # the last map comes normalised
            rows = F.layer_norm(rows, rows.shape[1:], dense.norm.weight, dense.norm.bias, 1e-6)
        filled = dense.mask_token.expand(*active.shape, -1).clone()
        filled[active] = rows
        filled = filled.permute(0, 3, 1, 2)
        if i == 0 and x_i.shape[1] == 32:
            assert isinstance(dense.proj, nn.Identity)
        else:
            filled = F.conv2d(filled, dense.proj.weight, dense.proj.bias, padding=0 if i == 0 else 1)
        y = y + filled
        if i < 3:
            up = decoder.steps[i]
            y = F.conv_transpose2d(y, up.up_sample.weight, up.up_sample.bias, 2, 1)
            y = batch_norm(up.conv[1], F.conv2d(y, up.conv[0].weight, padding=1)).clamp(0, 6)
            y = batch_norm(up.conv[4], F.conv2d(y, up.conv[3].weight, padding=1))
    expected = F.conv2d(y, decoder.proj.weight, decoder.proj.bias)
    assert len(decoder.steps) == 3  # a stride of 8
    torch.testing.assert_close(found, expected)


def test_the_papers_unet_beside_a_resnet50() -> None:
    """Widths 768, 384, 192 and 96 at strides 32 to 4, five steps, a 1x1 convolution at the smallest map, 3x3 at others."""
    with torch.device("meta"):
        resnet = backbones.build("resnet50", image_size=(224, 224))
        decoder = SparK(resnet, SparK.Config()).decoder
        convnext = backbones.build("convnext_small", image_size=(224, 224))
        other = SparK(convnext, SparK.Config()).decoder
    weights = [each.proj.weight.shape for each in decoder.densify]
    assert weights == [(768, 2048, 1, 1), (384, 1024, 3, 3), (192, 512, 3, 3), (96, 256, 3, 3)]
    assert [each.up_sample.weight.shape[0] for each in decoder.steps] == [768, 384, 192, 96, 48]
    assert [tuple(each.conv[3].weight.shape) for each in decoder.steps][-1] == (24, 48, 3, 3)
    assert decoder.proj.weight.shape == (3, 24, 1, 1)
    assert isinstance(other.densify[0].proj, nn.Identity)  # the widths agree
    assert [tuple(each.proj.weight.shape) for each in other.densify[1:]] == [
        (384, 384, 3, 3), (192, 192, 3, 3), (96, 96, 3, 3),
    ]  # fmt: skip


@torch.no_grad()
def test_the_decoder_of_fcmae_is_one_block_on_the_last_map() -> None:
    method, x = build(decoder="fcmae"), images()
    decoder = method.decoder
    assert isinstance(decoder, BlockDecoder)
    embedded = method.embed(a_batch(x), step())
    assert set(embedded) == {"images", "visible", "masked", "map0"}
    y = F.conv2d(embedded["map0"], decoder.densify.weight, decoder.densify.bias).permute(0, 2, 3, 1)
    y = torch.where(embedded["visible"].view(4, 4, 6, 1), y, decoder.mask_token)
    y = decoder.proj(decoder.block(y)).flatten(1, 2)
    expected = y.gather(1, embedded["masked"][..., None].expand(-1, -1, 192))
    torch.testing.assert_close(method.reconstruct(embedded), expected)
    with torch.device("meta"):
        encoder = backbones.build("convnextv2_base", image_size=(224, 224))
        published = SparK(encoder, SparK.Config(decoder="fcmae")).decoder
    assert published.densify.weight.shape == (512, 1024, 1, 1)
    assert published.proj.weight.shape == (3072, 512)


def test_decoders_begin_as_released() -> None:
    for decoder in ("unet", "fcmae"):
        method = build(decoder=decoder, decoder_dim=128)
        for name, part in method.decoder.named_modules():
            if isinstance(part, nn.ConvTranspose2d):
                deviation = (2 / (part.weight.shape[0] * 16)) ** 0.5  # of the fan out, ReLU
            elif isinstance(part, nn.Conv2d | nn.Linear):
                deviation = 0.02
            else:
                continue
            if part.weight.numel() > 1000:
                assert float(part.weight.detach().std()) == pytest.approx(deviation, rel=0.1), name
            assert part.bias is None or not part.bias.any()
        tokens = torch.cat([p.detach() for n, p in method.named_parameters() if n.endswith("mask_token")])
        assert float(tokens.std()) == pytest.approx(0.02, rel=0.25)


# ---- Processes.

RANK = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from spark_helpers import a_batch, build, images, step
from torch.nn.parallel import DistributedDataParallel
from ssl_pretrain import distributed
with distributed.world() as here:
    method = build("resnet_micro").train()
    rows = slice(here.rank * 6 // here.size, (here.rank + 1) * 6 // here.size)
    wrapped = DistributedDataParallel(method) if here.size > 1 else method
    losses = wrapped(a_batch(images(6)[rows]), step(6, rows=rows))
    losses.total.backward()
    loss = distributed.all_reduce_(losses.total.detach().clone()) / here.size
    found = {"loss": loss, **method.state_dict(), **{"gradient " + n: p.grad for n, p in method.named_parameters()}}
    if here.rank == 0:
        torch.save(found, sys.argv[1])
"""


def test_two_processes_give_what_one_gives_with_batch_norm_too(tmp_path: Path) -> None:
    """Loss, gradients and the statistics of the encoder's masked and the decoder's plain batch norms."""
    found = []
    for size in (1, 2):
        place = {"SSL_PRETRAIN_RENDEZVOUS": (tmp_path / f"meet{size}").as_uri(), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, tmp_path / f"{size}.pt", Path(__file__).parent],
                env={**os.environ, **place, "WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(size)
        ]
        assert [process.wait() for process in processes] == [0] * size
        found.append(torch.load(tmp_path / f"{size}.pt"))
    one, two = found
    assert sum("running_var" in name for name in one) > 10
    for name, value in one.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-8, msg=name)


# ---- What a run shows.


@every_decoder
def test_collapsed_state_has_the_stated_loss(decoder: str) -> None:
    """The mean colour is zero where the target is normalised; in plain pixels the loss depends on the images."""
    method = one_step.build("spark", decoder=decoder)
    make_zero_(method.decoder.proj)
    check_stated(method, {"loss": losses_of(method)})
    assert one_step.build("spark", norm_pix=False).collapsed(one_step.BATCH) == {}


def test_pictures_keep_what_was_visible() -> None:
    method, x = build().eval(), images()
    shown = method.pictures(a_batch(x), step())
    assert list(shown) == ["input", "masked", "reconstruction"]
    visible = pixels_of(method.embed(a_batch(x), step())["visible"])
    for name in ("masked", "reconstruction"):
        assert torch.allclose(shown[name].double()[visible], x[visible], atol=1e-6)
        assert not torch.allclose(shown[name].double()[~visible], x[~visible], atol=1e-6)
    assert not shown["masked"][~visible].any()


def test_other_image_sizes_than_the_configured_one() -> None:
    assert torch.isfinite(build().float()(a_batch(images(2, (48, 32)).float()), step(2)).total)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"mask_ratio": 0.0}, "--mask-ratio is 0.0"),
        ({"mask_ratio": 0.99}, r"--mask-ratio 0.99 keeps 0 of the 4 x 6 units of 8 x 8 pixels.*--stem-patch"),
        ({"mask_ratio": 0.01}, r"--mask-ratio 0.01 keeps 24 of the 4 x 6 units"),
        ({"decoder_dim": 36}, "--decoder-dim 36 must be a multiple of 8"),
        ({"decoder_dim": 0}, "--decoder-dim is 0"),
    ],
)
def test_knobs_that_cannot_be(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**knobs)


def test_encoders_that_cannot_be() -> None:
    with pytest.raises(UnsupportedByBackbone, match=r"spark needs an encoder that supports 'visible', and ViT does not.*"
                       r"a ConvNeXt \(--encoder convnextv2_tiny\) does"):  # fmt: skip
        SparK(backbones.build("vit_micro", image_size=(32, 32), patch_size=8), SparK.Config())
    thirds = backbones.build("convnextv2_micro", image_size=(48, 48), stem_patch=3)
    with pytest.raises(UserError, match=r"strides of 3, 6, 12, 24 pixels: use --decoder fcmae"):
        SparK(thirds, SparK.Config(mask_ratio=0.5))
    assert SparK(thirds, SparK.Config(mask_ratio=0.5, decoder="fcmae")).encoder is thirds


def test_the_encoders_final_norm_is_trained() -> None:
    """The last map enters the decoder after it, so that what evaluators read is what was trained."""
    method = build()
    method(a_batch(images()), step()).total.backward()
    assert method.encoder.norm.weight.grad.any()
    assert isinstance(method.decoder, UNetDecoder)
