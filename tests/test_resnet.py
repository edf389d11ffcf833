"""The ResNet against torchvision's with the same weights, and each option against what it is defined to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import import_torchvision
from torch import Tensor, nn

from ssl_pretrain import backbones, encoder
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.backbones.resnet import ResNet
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError

SIZE = (40, 72)
ONE_EACH = (1, 1, 1, 1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def resnet(name: str = "resnet18", size: tuple[int, int] = SIZE, in_chans: int = 3, **options: Any) -> ResNet:
    torch.manual_seed(0)
    model = backbones.build(name, image_size=size, in_chans=in_chans, **options)
    assert isinstance(model, ResNet)
    return model


def with_noise(model: ResNet) -> ResNet:
    """The model with statistics and gains unlike 0 and 1, as after some training."""
    for i, (name, value) in enumerate(model.state_dict().items()):
        if name.endswith(("bn1.bias", "bn2.bias", "bn3.bias", "downsample.1.bias", "running_mean")):
            value.copy_(0.2 * draw(*value.shape, seed=i))
        elif value.ndim == 1:
            value.copy_(0.7 + 0.3 * torch.rand(value.shape, generator=torch.Generator().manual_seed(i)))
    return model


def torchvision_like(model: ResNet) -> nn.Module:
    """torchvision's network without its classifier and with the same weights."""
    theirs = import_torchvision().models.resnet
    block = theirs.Bottleneck if model.config.bottleneck else theirs.BasicBlock
    other = theirs.ResNet(block, list(model.config.depths))
    if (width := model.config.width) != 64:
        other.inplanes, other.bn1 = width, nn.BatchNorm2d(width)
        for i, depth in enumerate(model.config.depths):
            made = other._make_layer(block, width * 2**i, depth, stride=2 if i else 1)
            setattr(other, f"layer{i + 1}", made)
    other.fc = nn.Identity()
    if model.in_chans != 3:
        other.conv1 = nn.Conv2d(model.in_chans, width, 7, 2, 3, bias=False)
    if model.config.stem == "small":
        other.conv1, other.maxpool = nn.Conv2d(model.in_chans, width, 3, 1, 1, bias=False), nn.Identity()
    other.load_state_dict(model.state_dict())
    return other.train(model.training).to(model.bn1.weight.dtype)


def theirs_map(other: Any, x: Tensor) -> Tensor:
    x = other.maxpool(other.relu(other.bn1(other.conv1(x))))
    return other.layer4(other.layer3(other.layer2(other.layer1(x))))


def test_every_size_is_built_as_published() -> None:
    """With 1000 classes 11,689,512 and 25,557,032 parameters (torchvision's model cards)."""
    for name, published, dim, depth in (("resnet18", 11689512, 512, 8), ("resnet50", 25557032, 2048, 16)):
        assert name in backbones.names()
        model = backbones.build(name, image_size=(224, 224))
        assert backbones.build(name, image_size=(32, 32), **model.describe()).config == model.config
        assert sum(p.numel() for p in model.parameters()) + 1000 * (model.dim + 1) == published
        assert (model.dim, model.depth, model.stride) == (dim, depth, (32, 32))
    micro = backbones.build("resnet_micro", image_size=(32, 32))
    assert (micro.dim, micro.depth, micro.stride, micro.map_channels) == (128, 4, (8, 8), (16, 32, 64, 128))
    assert sum(p.numel() for p in micro.parameters()) == 307536


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_torchvision_checkpoint_loads_strictly_and_gives_its_features(name: str) -> None:
    theirs = getattr(import_torchvision().models, name)(weights=None).eval()
    model = resnet(name).eval()
    model.load_state_dict({n: v for n, v in theirs.state_dict().items() if not n.startswith("fc.")})
    theirs.fc, x = nn.Identity(), draw(1, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(model(x).pooled, theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "in_chans", "stem"),
    [("resnet18", 3, "imagenet"), ("resnet18", 1, "small"), ("resnet50", 1, "imagenet"), ("resnet_micro", 3, "small")],
)
def test_outputs_gradients_and_statistics_equal_torchvision(
    name: str, in_chans: int, stem: str, training: bool
) -> None:
    """In float64, on images that are not square and of which the stride is no divisor."""
    size = (20, 12) if stem == "small" else SIZE
    model = with_noise(resnet(name, size, in_chans, stem=stem, depths=(1, 2, 1, 1))).double().train(training)
    other = torchvision_like(model)
    x = draw(3, in_chans, *size).double()
    found, expected = model(x), theirs_map(other, x)
    torch.testing.assert_close(found.patches, expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.pooled, expected.mean((2, 3)))
    assert found.grid == tuple(-(-side // stride) for side, stride in zip(size, model.stride, strict=True))
    assert (found.cls, found.prefix, found.blocks) == (None, None, ())

    weights = draw(*found.patches.shape, seed=3).double()
    (found.patches * weights).sum().backward()
    (expected.flatten(2).transpose(1, 2) * weights).sum().backward()
    gradients = {n: p.grad for n, p in other.named_parameters()}
    for n, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[n], atol=1e-8, rtol=1e-6)
    state = other.state_dict()
    for n, value in model.state_dict().items():
        if "running" in n:
            torch.testing.assert_close(value, state[n])


def test_a_bottleneck_strides_in_its_3x3_convolution() -> None:
    model = resnet("resnet50")
    block: Any = model.layer2[0]
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]


def test_weights_begin_kaiming_normal_over_the_fan_out() -> None:
    for name, parameter in resnet("resnet50").named_parameters():
        if parameter.ndim == 4:
            fan = parameter.shape[0] * parameter.shape[2] * parameter.shape[3]
            assert parameter.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05), name
        else:
            assert (parameter == float(name.endswith("weight"))).all(), name


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_residual_leaves_the_shortcuts_alone(name: str) -> None:
    """Behind the stem the network is then its shortcuts: written out here."""
    model = resnet(name, depths=(1, 2, 1, 1), zero_init_residual=True).eval()
    state, x = model.state_dict(), draw(2, 3, *SIZE)
    expected = F.conv2d(x, state["conv1.weight"], stride=2, padding=3) / (1 + 1e-5) ** 0.5
    expected = F.max_pool2d(expected.relu(), 3, 2, 1)
    for layer in (1, 2, 3, 4):
        weight = state.get(f"layer{layer}.0.downsample.0.weight")
        if weight is not None:
            expected = F.conv2d(expected, weight, stride=1 if layer == 1 else 2) / (1 + 1e-5) ** 0.5
        expected = expected.relu()
    with torch.no_grad():
        torch.testing.assert_close(model(x).pooled, expected.mean((2, 3)), atol=1e-5, rtol=1e-4)
    zeros = [n for n, p in model.named_parameters() if not p.any() and n.endswith("weight")]
    last = "bn2" if name == "resnet18" else "bn3"
    assert zeros == [f"layer{s}.{b}.{last}.weight" for s, b in ((1, 0), (2, 0), (2, 1), (3, 0), (4, 0))]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_gradients_reach_every_parameter(name: str) -> None:
    model = resnet(name, depths=ONE_EACH, stem="small").train()
    model(draw(4, 3, 16, 24)).pooled.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_parameter_has_a_layer(name: str) -> None:
    model = resnet(name)
    layers = {n: model.layer_of(n) for n, _ in model.named_parameters()}
    assert {n for n, layer in layers.items() if layer == 0} == {"conv1.weight", "bn1.weight", "bn1.bias"}
    assert list(layers.values()) == sorted(layers.values())  # in the order of the forward
    assert set(layers.values()) == set(range(model.depth + 1))
    assert layers["layer2.0.downsample.0.weight"] == model.config.depths[0] + 1
    with pytest.raises(KeyError):
        model.layer_of("fc.weight")


def test_images_of_any_size_are_taken() -> None:
    model = resnet(depths=ONE_EACH).eval()
    with torch.no_grad():
        for size in ((1, 1), (33, 64), (224, 31)):
            features = model(draw(2, 3, *size))
            assert features.grid == tuple(-(-side // 32) for side in size)
            assert features.patches.shape == (2, features.grid[0] * features.grid[1], 512)


def test_the_layout_of_the_images_in_memory_does_not_matter() -> None:
    model, x = resnet(depths=ONE_EACH).eval(), draw(2, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(model(x).patches, model(x.contiguous(memory_format=torch.channels_last)).patches)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast_to_bfloat16_stays_near_float32(training: bool) -> None:
    model, x = with_noise(resnet(depths=ONE_EACH, stem="small")).train(training), draw(4, 3, 16, 24)
    expected = model(x).pooled
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.pooled.dtype == found.patches.dtype == torch.float32
    assert F.cosine_similarity(found.pooled, expected).min() > 0.999
    found.pooled.sum().backward()
    assert model.conv1.weight.grad is not None


@pytest.mark.parametrize(
    ("option", "ask"),
    [
        ("keep", lambda m, x: m(x, keep=torch.zeros(2, 1, dtype=torch.long))),
        ("replace", lambda m, x: m(x, replace=(torch.zeros(2, 6, dtype=torch.bool), torch.zeros(512)))),
        ("attention", lambda m, x: m(x, attention="causal")),
        ("attention", lambda m, x: m(x, attention=torch.ones(1, 6, 6, dtype=torch.bool))),
        ("attention", lambda m, x: m(x, prefix_length=torch.ones(2))),
        ("blocks", lambda m, x: m(x, blocks=(-1,))),
    ],
)
def test_what_it_cannot_do_is_refused(option: str, ask: Callable[[ResNet, Tensor], Any]) -> None:
    model = resnet(depths=ONE_EACH)
    with pytest.raises(
        UnsupportedByBackbone, match=rf"called with '{option}', which ResNet does not support.*--encoder vit_small"
    ):
        ask(model, draw(2, 3, *SIZE))
    with pytest.raises(UnsupportedByBackbone, match=f"MAE needs an encoder that supports '{option}', and ResNet"):
        model.require("MAE", option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (2, 0, 2, 2)}, "--depths is 2 0 2 2; each must be above 0"),
        ({"depths": (2, 2, 2)}, "depths: .* needs 4 values"),
        ({"stem": "smal"}, "did you mean small"),
        ({"in_chans": 0}, "--in-chans is 0"),
        ({"image_size": (0, 32)}, "--image-size is 0 32; both sides must be above 0"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbones.build("resnet18", **{"image_size": SIZE, **options})


def test_images_of_other_channels_are_named() -> None:
    with pytest.raises(UserError, match="images of 3 channels, not 1"):
        resnet()(draw(2, 1, *SIZE))


@pytest.mark.parametrize(
    "options", [{"depths": [1, 1, 1, 1]}, {"stem": "small", "zero_init_residual": True, "depths": [1, 2, 1, 1]}]
)
def test_an_export_gives_the_same_output(options: dict[str, Any], tmp_path: Path) -> None:
    """After a step of training, so that running statistics are part of it."""
    model = resnet(size=(24, 16), in_chans=1, **options)
    model(draw(4, 1, 24, 16)).pooled.sum()
    assert model.bn1.running_mean is not None
    assert model.bn1.running_mean.any()
    written = Encoder(model, "resnet18", Preprocessing.for_size((24, 16), (0.5,), (0.2,)), {"method": "x"}).eval()
    encoder.save(tmp_path, written)
    read, x = encoder.load(tmp_path), draw(2, 1, 24, 16, seed=4)
    assert read.backbone.config == model.config
    with torch.no_grad():
        assert torch.equal(read(x).patches, written(x).patches)
    encoder.load_weights(tmp_path, resnet(size=(32, 32), in_chans=1, **options))
