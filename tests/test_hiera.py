"""Hiera against timm's with the same weights, what is left out against exact noise, and each option against what it is
defined to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import import_timm
from torch import Tensor, nn

from ssl_pretrain import backbones, encoder, pretext
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.backbones.hiera import Hiera
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts import multi_scale_fusion
from ssl_pretrain.pretext import Batch, Step

SIZE = (64, 96)
SMALL: dict[str, Any] = {"embed_dim": 8, "heads": 2, "depths": (1, 2, 2, 1)}
DEPTH = 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hiera(size: tuple[int, int] = SIZE, in_chans: int = 3, name: str = "hiera_tiny", **options: Any) -> Hiera:
    """A small Hiera in eval mode whose every parameter is noise, so that none hides behind a 0 or a 1."""
    model = backbones.build(
        name, image_size=size, in_chans=in_chans, **{**(SMALL if name == "hiera_tiny" else {}), **options}
    )
    assert isinstance(model, Hiera)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.15 * draw(*parameter.shape, seed=i))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def timms(model: Hiera, size: tuple[int, int]) -> Any:
    """timm's Hiera with the same weights."""
    kind, config = import_timm().models.hiera.Hiera, model.config
    other = kind(
        img_size=size, in_chans=model.in_chans, embed_dim=config.embed_dim, num_heads=config.heads, stages=config.depths,
        q_pool=config.q_pool, mask_unit_size=(config.unit_tokens,) * 2, num_classes=0,
        mask_unit_attn=tuple(i < config.local_stages for i in range(len(config.depths))),
        patch_kernel=(2 * config.patch_stride - 1,) * 2, patch_stride=(config.patch_stride,) * 2,
        patch_padding=(config.patch_stride - 1,) * 2,
    )  # fmt: skip
    other = other.to(model.norm.weight.dtype).eval()
    other.load_state_dict({"head." + n if n.startswith("norm.") else n: v for n, v in model.state_dict().items()})
    return other


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (SIZE, {}),
        ((128, 64), {"in_chans": 1}),
        ((32, 32), {}),
        (SIZE, {"q_pool": 2}),
        ((32, 48), {"name": "hiera_micro"}),
        ((32, 48), {"name": "hiera_micro", "q_pool": 1}),
    ],
    ids=["wide", "high, one channel", "one unit", "two poolings", "micro", "micro, one pooling"],
)
def test_outputs_maps_and_gradients_equal_timm(size: tuple[int, int], options: dict[str, Any]) -> None:
    """In float64; timm's forward features are the tokens before the final norm."""
    model = hiera(size, **options).double()
    other = timms(model, size)
    x = draw(2, model.in_chans, *size).double()
    found, expected = model(x, maps=True), other(x)
    torch.testing.assert_close(found.pooled, expected)
    maps = other.forward_intermediates(x, intermediates_only=True)
    assert [tuple(a.shape) for a in found.maps] == [tuple(b.shape) for b in maps]
    for ours, theirs, stride, width in zip(found.maps, maps, model.map_strides, model.map_channels, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.shape[1:] == (width, size[0] // stride[0], size[1] // stride[1])
    last = maps[-1].permute(0, 2, 3, 1)
    norm = F.layer_norm(last, (model.dim,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(found.patches, norm.flatten(1, 2))
    assert found.grid == last.shape[1:3] == tuple(side // model.stride[0] for side in size)
    assert (found.cls, found.prefix, found.blocks) == (None, None, ())

    g = draw(*found.pooled.shape, seed=7).double()
    found.pooled.backward(g)
    expected.backward(g)
    gradients = {n.removeprefix("head."): p.grad for n, p in other.named_parameters()}
    for n, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[n])


def test_units_that_are_left_out_are_those_of_timm() -> None:
    model = hiera(q_pool=2).double()
    x, keep = draw(2, 3, *SIZE).double(), torch.tensor([[0, 4, 5], [1, 2, 3]])
    mask = torch.zeros(2, 6, dtype=torch.bool).scatter(1, keep, True)
    tokens = timms(model, SIZE).forward_features(x, mask=mask)
    expected = F.layer_norm(
        tokens.reshape(2, -1, model.dim).mean(1), (model.dim,), model.norm.weight, model.norm.bias, 1e-6
    )
    torch.testing.assert_close(model(x, keep=keep).pooled, expected)


def test_every_size_is_timms_of_that_name() -> None:
    """Names and shapes of all weights; the paper's table 1 has 28, 35, 52, 70, 214 and 673 million parameters with 1000
    classes."""
    timm, counts = import_timm(), []
    with torch.device("meta"):
        for name in ("tiny", "small", "base", "base_plus", "large", "huge"):
            model = backbones.build(f"hiera_{name}", image_size=(224, 224))
            kind, arguments = timm.models.hiera.__dict__[f"hiera_{name}_224"], {"num_classes": 0}
            theirs = {n.replace("head.norm.", "norm."): v.shape for n, v in kind(**arguments).state_dict().items()}
            assert {n: v.shape for n, v in model.state_dict().items()} == theirs
            assert (model.stride, model.unit, model.token_dim) == ((32, 32), (32, 32), model.config.embed_dim)
            counts.append(round((sum(p.numel() for p in model.parameters()) + 1000 * (model.dim + 1)) / 1e6))
    assert counts == [28, 35, 52, 70, 214, 673]
    model = backbones.build("hiera_micro", image_size=(64, 64))
    assert (model.dim, model.depth, model.stride, model.unit) == (128, 5, (8, 8), (8, 8))
    assert backbones.build("hiera_micro", image_size=(64, 64), q_pool=1).stride == (4, 4)


# ---- What is left out.


@pytest.mark.parametrize("q_pool", [2, 3])
def test_pixels_of_units_that_are_left_out_change_nothing(q_pool: int) -> None:
    """Bit for bit, also not the maps, though the squares of the stem reach 3 pixels into the units before."""
    model, x, keep = hiera(q_pool=q_pool), draw(2, 3, *SIZE), torch.tensor([[4, 0, 5], [2, 3, 1]])
    gone = torch.ones(2, 6, dtype=torch.bool).scatter(1, keep, False).unflatten(1, (2, 3))
    gone = gone.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    side = 32 // model.stride[0]
    with torch.no_grad():
        one, other = (
            model(torch.where(gone, noise, x), keep=keep, maps=True) for noise in (0.0, draw(2, 3, *SIZE, seed=9))
        )
        assert one.patches.shape == (2, 3 * side * side, model.dim)
        assert [tuple(m.shape[2:]) for m in one.maps] == [(3 * 32 // s[0], 32 // s[0]) for s in model.map_strides]
        for a, b in zip((one.patches, one.pooled, *one.maps), (other.patches, other.pooled, *other.maps), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(one.patches, model(torch.where(gone, x, 9.0), keep=keep).patches)
        token = draw(8, seed=4)
        hidden = torch.ones(2, 6, dtype=torch.bool).scatter(1, keep, False)
        one, other = (
            model(torch.where(gone, noise, x), replace=(hidden, token)) for noise in (1.0, draw(2, 3, *SIZE, seed=9))
        )
        assert torch.equal(one.patches, other.patches)
        changed = model(torch.where(gone, 0.0, x), replace=(hidden, 2 * token)).patches
        assert not torch.equal(one.patches, changed)


@pytest.mark.parametrize("q_pool", [2, 3])
def test_all_units_are_the_whole_image(q_pool: int) -> None:
    """Unit after unit in the order that was asked for, in raster order within a unit; maps below each other."""
    model, x = hiera(q_pool=q_pool).double(), draw(2, 3, *SIZE).double()
    keep = torch.tensor([[3, 0, 5, 1, 4, 2], [0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        dense, kept = model(x, maps=True), model(x, keep=keep, maps=True)
    torch.testing.assert_close(kept.pooled, dense.pooled)
    assert kept.grid == dense.grid
    patches = dense.patches.unflatten(1, dense.grid).permute(0, 3, 1, 2)
    of_kept = kept.patches.mT.unflatten(2, (-1, 32 // model.stride[0]))
    for whole, parts in ((patches, of_kept), *zip(dense.maps, kept.maps, strict=True)):
        side = parts.shape[3]
        for image in range(2):
            for i, unit in enumerate(keep[image].tolist()):
                row, column = unit // 3 * side, unit % 3 * side
                expected = whole[image, :, row : row + side, column : column + side]
                torch.testing.assert_close(parts[image, :, i * side : (i + 1) * side], expected)


def test_a_replaced_unit_is_the_token_at_its_positions() -> None:
    """Where everything is replaced, an image is the token and the positions, whatever its pixels."""
    model, x, token = hiera(), draw(2, 3, *SIZE), draw(8, seed=4)
    everything = torch.ones(2, 6, dtype=torch.bool)
    found = model(x, replace=(everything, token))
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.copy_(token)
    torch.testing.assert_close(found.patches, model(x).patches)


# ---- Positions, layers, drop path.


@pytest.mark.parametrize("size", [(96, 64), (32, 128)])
def test_positions_are_resized_for_other_images(size: tuple[int, int]) -> None:
    """Bicubic without antialiasing in a forward pass; with it, where smaller, in weights for another size."""
    model, x = hiera(), draw(1, 3, *size)
    for adapted in (False, True):
        other = hiera(size)
        table = model.pos_embed.detach().unflatten(1, (16, 24)).permute(0, 3, 1, 2)
        to = (size[0] // 4, size[1] // 4)
        expected = F.interpolate(table, to, mode="bicubic", antialias=False)
        if adapted:
            per_axis = F.interpolate(table, (to[0], 24), mode="bicubic", antialias=to[0] < 16)
            expected = F.interpolate(per_axis, to, mode="bicubic", antialias=to[1] < 24)
            weights = other.adapt(model.state_dict(), SIZE)
            torch.testing.assert_close(weights["pos_embed"], expected.flatten(2).mT, atol=1e-5, rtol=1e-5)
        else:
            with torch.no_grad():
                other.load_state_dict({**model.state_dict(), "pos_embed": expected.flatten(2).mT})
                torch.testing.assert_close(model(x).patches, other(x).patches, atol=1e-4, rtol=1e-4)


def test_every_parameter_has_a_layer() -> None:
    model = hiera()
    layers = {n: model.layer_of(n) for n, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(DEPTH + 2))
    assert {n for n, layer in layers.items() if layer == 0} == {
        "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
    }  # fmt: skip
    assert {n for n, layer in layers.items() if layer == DEPTH + 1} == {"norm.weight", "norm.bias"}
    assert layers["blocks.3.proj.weight"] == layers["blocks.3.attn.qkv.bias"] == 4
    with pytest.raises(KeyError):
        model.layer_of("head.fc.weight")


def test_weights_begin_as_published() -> None:
    torch.manual_seed(0)
    model = backbones.build("hiera_micro", image_size=SIZE)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
        else:
            assert (parameter == (0.02 if name.endswith("bias") else 1.0)).all(), name
    assert all(part.eps == 1e-6 for part in model.modules() if isinstance(part, nn.LayerNorm))


def test_drop_path_drops_each_samples_branches_at_the_rates_of_their_depth() -> None:
    """A dropped branch is one whose last layer is 0; a kept one has its over the probability to be kept."""
    model, x = hiera(drop_path=0.5).train(), draw(2, 3, *SIZE)
    drop = torch.rand(2, 2 * DEPTH, generator=torch.Generator().manual_seed(5))
    drop[0, 2 * 3], drop[0, 2 * 5 + 1], drop[1, 2 * 5] = 0.29, 0.51, 0.49
    found, dropped = model(x, drop=drop), 0
    for sample in range(2):
        plain = hiera()
        with torch.no_grad():
            for i, block in enumerate(plain.blocks):
                for j, last in enumerate((block.attn.proj, block.mlp.fc2)):  # type: ignore[union-attr]
                    kept = drop[sample, 2 * i + j].item() >= i / 10
                    dropped += not kept
                    for parameter in last.parameters():  # type: ignore[union-attr]
                        parameter.mul_(kept / (1 - i / 10))
            torch.testing.assert_close(
                found.pooled[sample], plain(x[sample : sample + 1]).pooled[0], atol=1e-4, rtol=1e-4
            )
    assert dropped >= 2
    with pytest.raises(RuntimeError, match=r"pass drop=step.rand\(12\)"):
        model(x)
    torch.testing.assert_close(model.eval()(x).pooled, hiera()(x).pooled)


# ---- Precision, mistakes, exports.


def test_autocast_to_bfloat16_stays_near_float32() -> None:
    model = backbones.build("hiera_micro", image_size=(32, 32), drop_path=0.1).train()
    x, drop = draw(4, 3, 32, 32), torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    expected = model(x, drop=drop, maps=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, drop=drop, maps=True)
    assert {found.pooled.dtype, found.patches.dtype, *(m.dtype for m in found.maps)} == {torch.float32}
    assert F.cosine_similarity(found.pooled, expected.pooled).min() > 0.999
    found.pooled.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("option", "ask"),
    [
        ("attention", lambda m, x: m(x, attention="causal")),
        ("attention", lambda m, x: m(x, prefix_length=torch.ones(2))),
        ("blocks", lambda m, x: m(x, blocks=(-1,))),
    ],
    ids=["causal", "prefix", "blocks"],
)
def test_what_it_cannot_do_is_refused(option: str, ask: Callable[[Hiera, Tensor], Any]) -> None:
    with pytest.raises(UnsupportedByBackbone, match=f"called with '{option}', which Hiera does not support"):
        ask(hiera(), draw(2, 3, *SIZE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (2, 0, 2, 2)}, "--depths is 2 0 2 2; each must be at least 1"),
        ({"heads": 3}, "--heads 3 must divide --embed-dim 8"),
        ({"unit_tokens": 6}, "--unit-tokens 6 must be a power of 2"),
        ({"q_pool": 4}, "--q-pool 4 is too much: 4 stages of units of 8 x 8 tokens can be pooled 3 times"),
        ({"unit_tokens": 4}, "--q-pool 3 is too much: 4 stages of units of 4 x 4 tokens can be pooled 2 times"),
        ({"drop_path": 1.0}, "--drop-path is 1.0; it must be at least 0 and below 1"),
        ({"in_chans": 0}, "--in-chans is 0"),
        ({"image_size": (48, 90)}, "images of 48 x 90 pixels .* units of 32 x 32 pixels: use --image-size 64 96"),
    ],
    ids=["depths", "heads", "unit", "poolings", "small unit", "drop path", "channels", "size"],
)
def test_a_mistake_is_named_with_its_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbones.build("hiera_tiny", **{"image_size": SIZE, **SMALL, **options})


def test_an_export_gives_the_same_output_and_opens_in_timm(tmp_path: Path) -> None:
    model = hiera((32, 64), 1, drop_path=0.2, q_pool=2)
    written = Encoder(model, "hiera_tiny", Preprocessing.for_size((32, 64), (0.5,), (0.2,)), {"method": "x"})
    encoder.save(tmp_path, written.eval())
    read, x = encoder.load(tmp_path), draw(2, 1, 32, 64, seed=4)
    assert read.backbone.config == model.config
    theirs = import_timm().create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(read(x).patches, written(x).patches)
        torch.testing.assert_close(theirs(x), written(x).pooled, atol=1e-5, rtol=1e-5)
    other = hiera((64, 64), 1, q_pool=3)  # the same weights at another size and stride
    encoder.load_weights(tmp_path, other)
    assert torch.equal(other.norm.weight, model.norm.weight)


# ---- Masked training on it.


def step(batch: int) -> Step:
    return Step(step=0, total=10, noise=3, rows=slice(0, batch), batch_size=batch, device=torch.device("cpu"))


def method(name: str, size: tuple[int, int] = (24, 32), q_pool: int = 1, **options: Any) -> Any:
    kind = pretext.load(name)
    torch.manual_seed(0)
    built = kind(backbones.build("hiera_micro", image_size=size, q_pool=q_pool), kind.Config(**options))
    built.prepare(100)
    return built.train()


MAE: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.6}


def test_fusion_adds_each_finer_map_patch_by_patch() -> None:
    """In NumPy, from the maps of the whole image: no use of the order of kept units."""
    torch.manual_seed(0)
    model = backbones.build("hiera_micro", image_size=(16, 24)).double()
    fusion = multi_scale_fusion.make(model)
    assert fusion is not None
    fusion.double()
    x, keep = draw(1, 3, 16, 24).double(), torch.tensor([[4, 0, 2, 5, 1, 3]])
    with torch.no_grad():
        fused = fusion(model(x, keep=keep, maps=True)).patches[0].numpy()
        whole = model(x, maps=True)
    assert [tuple(head.weight.shape) for head in fusion.heads] == [(128, 32, 4, 4), (128, 64, 2, 2)]
    for i, unit in enumerate(keep[0].tolist()):
        total = whole.patches[0, unit].numpy()
        for head, level in zip(fusion.heads, whole.maps, strict=False):
            side = head.weight.shape[2]
            row, column = unit // 3 * side, unit % 3 * side
            seen = level[0, :, row : row + side, column : column + side].numpy()
            total = total + np.einsum("oiyx,iyx->o", head.weight.detach().numpy(), seen) + head.bias.detach().numpy()
        total = (total - total.mean()) / np.sqrt(total.var() + 1e-6)
        np.testing.assert_allclose(fused[i], total, atol=1e-10)


def test_a_vit_has_no_fusion() -> None:
    assert multi_scale_fusion.make(backbones.build("vit_micro", image_size=(32, 32))) is None
    mae = method("mae", **MAE)
    with pytest.raises(ValueError, match="encode with maps=True"):
        mae.fusion(mae.encoder(draw(2, 3, 24, 32)))


@pytest.mark.parametrize("q_pool", [1, 2])
def test_mae_masks_units_and_trains_every_weight(q_pool: int) -> None:
    """12 units, of which 4 are kept, of 2 x 2 or one patch; hidden pixels do not reach the predictions."""
    mae, images = method("mae", q_pool=q_pool, **MAE), draw(3, 3, 24, 32)
    side = 4 * q_pool
    predicted, masked, keep, grid = mae.reconstruct(images, step(3))
    assert grid == (24 // side, 32 // side)
    assert (keep.shape[1], masked.shape[1]) == ((16, 32) if q_pool == 1 else (4, 8))
    assert predicted.shape == (3, masked.shape[1], side * side * 3)
    hidden = torch.zeros(3, grid[0] * grid[1], dtype=torch.bool).scatter(1, masked, True).unflatten(1, grid)
    hidden = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
    assert torch.equal(predicted, mae.reconstruct(torch.where(hidden, 9.0, images), step(3))[0])
    assert not torch.equal(predicted, mae.reconstruct(torch.where(hidden, images, 9.0), step(3))[0])
    losses = mae(Batch(views={"image": images}, index=torch.arange(3)), step(3))
    losses.total.backward()
    assert [n for n, p in mae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_simmim_trains_every_weight() -> None:
    simmim, images = method("simmim", (48, 48), q_pool=2), draw(3, 3, 48, 48)
    assert simmim.mask_token.shape == (32,)
    units, counted = simmim.mask(images, step(3))
    assert (units.shape, float(counted)) == ((3, 36), 22.0)
    losses = simmim(Batch(views={"image": images}, index=torch.arange(3)), step(3))
    losses.total.backward()
    assert [n for n, p in simmim.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    hidden = units.unflatten(1, (6, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    painted = [simmim.paint(torch.where(hidden, noise, images), units, step(3)) for noise in (0.0, 7.0)]
    assert torch.equal(*painted)
