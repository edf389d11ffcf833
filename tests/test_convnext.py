"""The ConvNeXt against timm's with the same weights, and each option against what it is defined to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import import_timm
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_pretrain import backbones, encoder
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.backbones.convnext import ConvNeXt, GlobalResponseNorm
from ssl_pretrain.distributed.batch_norm import couples_samples
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign import conversion
from ssl_pretrain.foreign.specs import Spec

SIZE = (32, 48)
DIMS, DEPTHS = (8, 16, 24, 32), (1, 2, 2, 1)
DEPTH = 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convnext(size: tuple[int, int] = SIZE, in_chans: int = 3, **options: Any) -> ConvNeXt:
    """A small ConvNeXt in eval mode whose every parameter is noise, so that none hides behind a 0 or a 1."""
    options = {"dims": DIMS, "depths": DEPTHS, **options}
    model = backbones.build("convnext_micro", image_size=size, in_chans=in_chans, **options)
    assert isinstance(model, ConvNeXt)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.15 * draw(*parameter.shape, seed=i))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def test_every_size_is_built_as_its_size_says() -> None:
    """convnext_tiny has 28,589,128 parameters with 1000 classes (timm's model card; 28.6 M in the paper's table 1)."""
    for name, (dim, depth, stride) in {"convnext_micro": (256, 5, 16), "convnext_tiny": (768, 18, 32)}.items():
        assert name in backbones.names()
        model = backbones.build(name, image_size=(224, 224))
        assert backbones.build(name, image_size=(32, 32), **model.describe()).config == model.config
        assert (model.dim, model.depth, model.stride) == (dim, depth, (stride, stride))
    assert sum(p.numel() for p in model.parameters()) + 1000 * (model.dim + 1) == 28589128


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("size", "in_chans", "stem_patch"),
    [(SIZE, 3, 2), ((64, 32), 1, 4), ((37, 50), 3, 2)],
    ids=["wide", "high, one channel", "no multiple of the stride"],
)
def test_outputs_and_gradients_equal_timm(size: tuple[int, int], in_chans: int, stem_patch: int, version: int) -> None:
    """In float64; timm's forward features are the map before the final norm."""
    timm = import_timm()
    second = {"layer_scale": None, "grn": True} if version == 2 else {}
    model = convnext(size, in_chans, stem_patch=stem_patch, **second).double()
    theirs = {"ls_init_value": None, "use_grn": True} if version == 2 else {}
    other = timm.models.convnext.ConvNeXt(num_classes=0, depths=DEPTHS, dims=DIMS, **theirs)
    other.stem[0] = nn.Conv2d(in_chans, DIMS[0], stem_patch, stem_patch)
    other = other.double().eval()
    weights = model.state_dict()
    other.load_state_dict({"head." + n if n.startswith("norm.") else n: v for n, v in weights.items()})
    x = draw(2, in_chans, *size).double()
    found, expected = model(x, maps=True), other(x)
    last = other.forward_features(x)
    for one, two in zip(found.maps, other.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(found.pooled, expected)
    channels_last = F.layer_norm(last.permute(0, 2, 3, 1), (DIMS[-1],), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(found.patches, channels_last.flatten(1, 2))
    assert found.grid == tuple(last.shape[2:]) == tuple(side // (8 * stem_patch) for side in size)
    assert (found.cls, found.prefix, found.blocks) == (None, None, ())

    g = draw(*found.pooled.shape, seed=7).double()
    found.pooled.backward(g)
    expected.backward(g)
    gradients = {n.removeprefix("head."): p.grad for n, p in other.named_parameters()}
    for n, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[n])


@pytest.mark.parametrize("name", [name for name in backbones.own() if name.startswith("convnext")])
def test_every_published_size_has_the_parameters_of_timm(name: str) -> None:
    """Names and shapes; timm has the linear layers of the smaller ones as convolutions."""
    if name.endswith("_micro"):
        pytest.skip("ours alone")
    timm = import_timm()
    with torch.device("meta"):
        model = backbones.build(name, image_size=(224, 224))
        other = timm.create_model(name, num_classes=0)
    theirs = {n.removeprefix("head."): p for n, p in other.named_parameters()}
    shapes = {n: p.shape[:2] if p.shape[2:] == (1, 1) else p.shape for n, p in theirs.items()}
    assert {n: p.shape for n, p in model.named_parameters()} == shapes


@torch.no_grad()
@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
def test_a_file_of_timm_is_converted(name: str, tmp_path: Path) -> None:
    """Of atto, whose linear layers are 1x1 convolutions there."""
    timm = import_timm()
    torch.manual_seed(0)
    other = timm.create_model(name, pretrained=False).eval()
    for parameter in other.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(other.state_dict(), tmp_path / "timm.safetensors")
    spec = Spec.parse(f"timm:{name},checkpoint={tmp_path / 'timm.safetensors'}")
    assert spec is not None
    converted = conversion.convert(spec, (64, 96))
    assert converted.name == name
    assert converted.backbone.image_size == (64, 96)
    x = draw(1, 3, 64, 96)
    expected = other.forward_head(other.forward_features(x), pre_logits=True)
    torch.testing.assert_close(converted(x).pooled, expected, atol=1e-5, rtol=1e-4)


def test_a_response_norm_is_the_papers() -> None:
    """Algorithm 1, in NumPy: per image, and nothing at first."""
    norm, x = GlobalResponseNorm(5), draw(2, 3, 4, 5)
    assert torch.equal(norm(x), x)
    with torch.no_grad():
        norm.weight.copy_(draw(5, seed=1))
        norm.bias.copy_(draw(5, seed=2))
    a, weight, bias = x.double().numpy(), norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
    g = np.sqrt((a**2).sum((1, 2), keepdims=True))
    expected = weight * (a * (g / (g.mean(-1, keepdims=True) + 1e-6))) + bias + a
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    zeros = torch.zeros(1, 2, 2, 5, requires_grad=True)
    norm(zeros).sum().backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


def test_a_whole_convnext_tiny_of_timm_loads_and_gives_its_features() -> None:
    timm = import_timm()
    torch.manual_seed(0)
    other = timm.create_model("convnext_tiny", pretrained=False).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.3)  # at 1e-6 no block would show
    model = backbones.build("convnext_tiny", image_size=(64, 64)).eval()
    weights = {n.replace("head.norm.", "norm."): v for n, v in other.state_dict().items() if "head.fc" not in n}
    model.load_state_dict(weights)
    x = draw(1, 3, 64, 64)
    with torch.no_grad():
        expected = other.forward_head(other.forward_features(x), pre_logits=True)
        torch.testing.assert_close(model(x).pooled, expected, atol=1e-4, rtol=1e-4)


def test_weights_begin_as_published() -> None:
    torch.manual_seed(0)
    model = backbones.build("convnext_micro", image_size=SIZE)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert (parameter == (1e-6 if "gamma" in name else float(name.endswith("weight")))).all(), name
    assert all(part.eps == 1e-6 for part in model.modules() if isinstance(part, nn.LayerNorm))


def test_no_sample_sees_another() -> None:
    model, x = convnext().train(), draw(3, 3, *SIZE)
    assert not couples_samples(model)
    torch.testing.assert_close(model(x).patches[:1], model(x[:1]).patches)


def test_gradients_reach_every_parameter() -> None:
    model = backbones.build("convnext_micro", image_size=SIZE, layer_scale=0.1).train()
    (model(draw(2, 3, *SIZE)).patches * draw(2, 6, 256, seed=1)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_every_parameter_has_a_layer() -> None:
    model = convnext()
    layers = {n: model.layer_of(n) for n, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(DEPTH + 2))
    assert list(layers.values()) == sorted(layers.values())  # in the order of the forward
    assert {n.split(".")[0] for n, layer in layers.items() if layer == 0} == {"stem"}
    assert {n for n, layer in layers.items() if layer == DEPTH + 1} == {"norm.weight", "norm.bias"}
    assert layers["stages.2.downsample.1.weight"] == layers["stages.2.blocks.0.gamma"] == 4
    assert layers["stages.2.blocks.1.gamma"] == 5
    with pytest.raises(KeyError):
        model.layer_of("head.fc.weight")


# ---- Drop path.


def test_drop_path_drops_each_samples_branches_at_the_rates_of_their_depth() -> None:
    """A dropped branch is a block whose gamma is 0; a kept one has its gamma over the probability to be kept."""
    model, x = convnext(drop_path=0.5).train(), draw(3, 3, *SIZE)
    rates = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    drop = torch.rand(3, 2 * DEPTH, generator=torch.Generator().manual_seed(5))
    drop[0, 2 * 3], drop[0, 2 * 5], drop[1, 2 * 5] = 0.29, 0.51, 0.49
    found = model(x, drop=drop)
    dropped = 0
    for sample in range(3):
        plain = convnext()
        blocks = [block for stage in plain.stages for block in stage.blocks]  # type: ignore[union-attr]
        with torch.no_grad():
            for i, (block, rate) in enumerate(zip(blocks, rates, strict=True)):
                kept = drop[sample, 2 * i].item() >= rate
                dropped += not kept
                block.gamma.mul_(kept / (1 - rate))
            torch.testing.assert_close(found.pooled[sample], plain(x[sample : sample + 1]).pooled[0])
    assert dropped >= 2
    again = drop.clone()
    again[:, 1::2] = 0
    torch.testing.assert_close(model(x, drop=again).pooled, found.pooled)  # the second of each pair is not used


def test_drop_path_needs_noise_in_training_only() -> None:
    model, x = convnext(drop_path=0.5), draw(2, 3, *SIZE)
    torch.testing.assert_close(model(x).pooled, convnext()(x).pooled)
    with pytest.raises(RuntimeError, match=r"pass drop=step.rand\(12\)"):
        model.train()(x)
    torch.testing.assert_close(convnext().train()(x, drop=torch.zeros(2, 12)).pooled, convnext()(x).pooled)
    model.require("DINO", "drop_path")


# ---- Precision, mistakes, exports.


def test_autocast_to_bfloat16_stays_near_float32() -> None:
    model, x = convnext(drop_path=0.1).train(), draw(4, 3, *SIZE)
    drop = torch.rand(4, 2 * DEPTH, generator=torch.Generator().manual_seed(0))
    expected = model(x, drop=drop)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, drop=drop)
    assert found.pooled.dtype == found.patches.dtype == torch.float32
    assert F.cosine_similarity(found.pooled, expected.pooled).min() > 0.999
    found.pooled.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_layout_of_the_images_in_memory_does_not_matter() -> None:
    model, x = convnext(), draw(2, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(model(x).patches, model(x.contiguous(memory_format=torch.channels_last)).patches)


@pytest.mark.parametrize(
    ("option", "ask"),
    [
        ("keep", lambda m, x: m(x, keep=torch.zeros(2, 1, dtype=torch.long))),
        ("replace", lambda m, x: m(x, replace=(torch.zeros(2, 6, dtype=torch.bool), torch.zeros(32)))),
        ("attention", lambda m, x: m(x, attention="causal")),
        ("attention", lambda m, x: m(x, attention=torch.ones(1, 6, 6, dtype=torch.bool))),
        ("attention", lambda m, x: m(x, prefix_length=torch.ones(2))),
        ("blocks", lambda m, x: m(x, blocks=(-1,))),
    ],
)
def test_what_it_cannot_do_is_refused(option: str, ask: Callable[[ConvNeXt, Tensor], Any]) -> None:
    model = convnext()
    with pytest.raises(
        UnsupportedByBackbone, match=rf"called with '{option}', which ConvNeXt does not support.*--encoder vit_small"
    ):
        ask(model, draw(2, 3, *SIZE))
    with pytest.raises(UnsupportedByBackbone, match=f"MAE needs an encoder that supports '{option}', and ConvNeXt"):
        model.require("MAE", option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (2, 0, 2, 2)}, "--depths is 2 0 2 2; each must be above 0"),
        ({"dims": (8, 8, 8, -8)}, "--dims is 8 8 8 -8; each must be above 0"),
        ({"stem_patch": 0}, "--stem-patch is 0; it must be above 0"),
        ({"layer_scale": 0.0}, "--layer-scale is 0.0; it must be above 0"),
        ({"drop_path": 1.0}, "--drop-path is 1.0; it must be at least 0 and below 1"),
        ({"in_chans": 0}, "--in-chans is 0"),
        ({"image_size": (15, 48)}, "images of 15 x 48 pixels .* stride, 16 pixels: use --image-size 16 48 or a small"),
        ({"droppath": 0.1}, "did you mean drop_path"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbones.build("convnext_micro", **{"image_size": SIZE, **options})


def test_images_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match="images of 3 channels, not 1"):
        convnext()(draw(2, 1, *SIZE))
    with pytest.raises(UserError, match="images of 32 x 12 pixels"):
        convnext()(draw(2, 3, 32, 12))
    assert convnext(stem_patch=1)(draw(2, 3, 8, 8)).grid == (1, 1)


def test_an_export_gives_the_same_output(tmp_path: Path) -> None:
    model = convnext((32, 16), 1, drop_path=0.2)
    written = Encoder(model, "convnext_micro", Preprocessing.for_size((32, 16), (0.5,), (0.2,)), {"method": "x"})
    encoder.save(tmp_path, written.eval())
    read, x = encoder.load(tmp_path), draw(2, 1, 32, 16, seed=4)
    assert read.backbone.config == model.config
    with torch.no_grad():
        assert torch.equal(read(x).patches, written(x).patches)
    other = convnext((64, 64), 1, drop_path=0.0)
    with torch.no_grad():
        other.norm.bias.zero_()
        encoder.load_weights(tmp_path, other)
        torch.testing.assert_close(other(x).pooled, written(x).pooled)
