"""Encoders of a part of an image, against networks of point lists: every layer has a list of the visible positions, and
nothing else. The lists are written here, without the package's masks and norms."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain import backbones
from ssl_pretrain.backbones.convnext import ConvNeXt
from ssl_pretrain.backbones.masked_convolution import Visible
from ssl_pretrain.backbones.resnet import BasicBlock, ResNet
from ssl_pretrain.errors import UserError

UNITS = [[[1, 0, 1], [0, 1, 1]], [[0, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 1]]]  # of three images, 2 x 3 units
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet18", {"depths": (1, 2, 1, 1), "width": 8}),
    "resnet50": ("resnet50", {"depths": (1, 1, 2, 1), "width": 4}),
    "resnet_micro": ("resnet_micro", {"width": 8}),
    "convnext": ("convnext_micro", {"dims": (8, 16, 24, 32)}),
    "convnext, stem of 4": ("convnext_micro", {"dims": (8, 16, 24, 32), "stem_patch": 4, "depths": (1, 1, 1, 1)}),
    "convnext 2": ("convnextv2_micro", {"dims": (8, 16, 24, 32)}),
}
case = pytest.mark.parametrize("name", CASES)


def built(name: str) -> Any:
    """The small encoder of a case in float64, for images of 2 x 3 units. Every parameter is noise."""
    kind, options = CASES[name]
    stride = backbones.build(kind, image_size=(64, 64), **options).stride
    model = backbones.build(kind, image_size=(2 * stride[0], 3 * stride[1]), **options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 + 0.2 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model


def drawn(model: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, *model.image_size, generator=generator, dtype=torch.float64)


def visible() -> Tensor:
    return torch.tensor(UNITS, dtype=torch.bool).flatten(1)


def mask(x: Tensor) -> Tensor:
    """Which positions (B, Y, X) of a map (B, c, Y, X) exist."""
    block = np.ones((x.shape[2] // 2, x.shape[3] // 3))
    return torch.from_numpy(np.stack([np.kron(units, block) for units in UNITS])).bool()


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
    return y * mask(y)[:, None]


# ---- ResNet: batch norm of the list of all images' points.


def normed(norm: Any, x: Tensor) -> Tensor:
    here = mask(x)
    points = x.permute(0, 2, 3, 1)[here]
    y = F.batch_norm(points, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, 1e-5)
    return torch.zeros_like(x.permute(0, 2, 3, 1)).index_put(torch.where(here), y).permute(0, 3, 1, 2)


def resnet_of_points(model: ResNet, x: Tensor) -> list[Tensor]:
    x = normed(model.bn1, convolved(model.conv1, x * mask(x)[:, None])).relu()
    if model.config.stem == "imagenet":
        x = F.max_pool2d(x, 3, 2, 1)
        x = x * mask(x)[:, None]
    maps = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:  # type: ignore[union-attr]
            y = normed(block.bn1, convolved(block.conv1, x)).relu()
            y = normed(block.bn2, convolved(block.conv2, y))
            if not isinstance(block, BasicBlock):
                y = normed(block.bn3, convolved(block.conv3, y.relu()))
            shortcut = block.downsample
            x = (y + (x if shortcut is None else normed(shortcut[1], convolved(shortcut[0], x)))).relu()
        maps.append(x)
    return maps


# ---- ConvNeXt: each image by itself.


def on_points(x: Tensor, function: Any) -> Tensor:
    """A function of the list (n, c) of an image's points, at their places."""
    x, here = x.permute(0, 2, 3, 1), mask(x)
    images = []
    for image, at in zip(x, here, strict=True):
        y = function(image[at])
        images.append(torch.zeros(*image.shape[:2], y.shape[1], dtype=y.dtype).index_put(torch.where(at), y))
    return torch.stack(images).permute(0, 3, 1, 2)


def mlp_of_points(block: Any, points: Tensor) -> Tensor:
    hidden = F.gelu(block.mlp.fc1(block.norm(points)))
    if hasattr(block.mlp, "grn"):
        norms = hidden.square().sum(0).sqrt()
        hidden = block.mlp.grn.weight * hidden * (norms / (norms.mean() + 1e-6)) + block.mlp.grn.bias + hidden
    y = block.mlp.fc2(hidden)
    return y if block.gamma is None else y * block.gamma


def convnext_of_points(model: ConvNeXt, x: Tensor) -> list[Tensor]:
    x = on_points(convolved(model.stem[0], x), model.stem[1])  # type: ignore[arg-type]
    maps = []
    for stage in model.stages:
        if stage.downsample is not None:
            x = convolved(stage.downsample[1], on_points(x, stage.downsample[0]))
        for block in stage.blocks:
            x = x + on_points(convolved(block.conv_dw, x), lambda points, block=block: mlp_of_points(block, points))
        maps.append(x)
    return maps


@case
def test_maps_gradients_and_statistics_are_those_of_point_lists(name: str) -> None:
    model = built(name).train()
    other = copy.deepcopy(model)
    x, seen = drawn(model), visible()
    found = model(x, maps=True, visible=seen)
    maps = resnet_of_points(other, x) if isinstance(model, ResNet) else convnext_of_points(other, x)
    for one, two in zip(found.maps, maps, strict=True):
        torch.testing.assert_close(one, two)
    last = maps[-1].flatten(2).mT
    count = seen.sum(1, keepdim=True)
    if isinstance(model, ResNet):
        patches, pooled = last, last.sum(1) / count
    else:
        patches, pooled = other.norm(last) * seen[..., None], other.norm(last.sum(1) / count)
    torch.testing.assert_close(found.patches, patches)
    torch.testing.assert_close(found.pooled, pooled)

    for given in ((found.pooled, found.patches, *found.maps), (pooled, patches, *maps)):
        sum((part * part.roll(1, 1)).sum() for part in given).backward()  # type: ignore[union-attr]
    for (n, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, two.grad, msg=n)
    for (n, one), two in zip(model.named_buffers(), other.buffers(), strict=True):
        if not n.endswith("num_batches_tracked"):
            torch.testing.assert_close(one, two, msg=n)


@case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_what_is_not_visible_has_no_influence_and_no_gradient(name: str, training: bool) -> None:
    """Exactly; also pixels that are not numbers."""
    model = built(name).float().train(training)
    x, seen = drawn(model).float(), visible()
    hidden = ~mask(x)[:, None].expand_as(x)
    states, results = [], []
    for pixels in (x, torch.where(hidden, drawn(model, 5).float(), x), torch.where(hidden, torch.nan, x)):
        each = copy.deepcopy(model)
        given = pixels.clone().requires_grad_()
        found = each(given, maps=True, visible=seen)
        sum(part.square().sum() for part in (found.pooled, *found.maps)).backward()  # type: ignore[union-attr]
        assert given.grad is not None
        assert not given.grad[hidden].any()
        assert given.grad[~hidden].any()
        results.append([found.patches, found.pooled, *found.maps, *(p.grad for p in each.parameters())])
        states.append(each.state_dict())
    for other, state in zip(results[1:], states[1:], strict=True):
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
        assert all(torch.equal(value, state[n]) for n, value in states[0].items())
    for part in (results[0][0].mT.unflatten(2, (2, 3)), *results[0][2:6]):
        assert not part[~mask(part)[:, None].expand_as(part)].any()


@case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_with_everything_visible_it_is_the_dense_network(name: str, training: bool) -> None:
    dense = built(name).float().train(training)
    masked, x = copy.deepcopy(dense), drawn(dense).float()
    found, expected = masked(x, maps=True, visible=torch.ones(3, 6, dtype=torch.bool)), dense(x, maps=True)
    for one, two in zip(
        (found.pooled, found.patches, *found.maps), (expected.pooled, expected.patches, *expected.maps), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    for one, two in zip(masked.buffers(), dense.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_autocast_stays_near_float32() -> None:
    for name in ("resnet_micro", "convnext 2"):
        model = built(name).float().train()
        x, seen = drawn(model).float(), visible()
        expected = model(x, visible=seen)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x, visible=seen)
        assert found.pooled.dtype == found.patches.dtype == torch.float32
        assert F.cosine_similarity(found.pooled, expected.pooled).min() > 0.99
        assert not found.patches[~seen].any()


def test_masks_repeat_the_units() -> None:
    units = Visible.of(torch.zeros(3, 1, 8, 12), visible(), (4, 4))
    for side in (1, 2, 4):
        x = torch.ones(3, 2, 2 * side, 3 * side)
        assert torch.equal(units.only(x), (x * mask(x)[:, None]).float())
        assert torch.equal(units.count(2 * side, 3 * side), torch.tensor([[4], [1], [3]]) * side**2)


def test_masks_that_do_not_fit_are_named() -> None:
    model = built("resnet_micro").float()
    with pytest.raises(UserError, match=r"images of 20 x 24 pixels .* in units of 8 x 8: use an --image-size"):
        model(torch.zeros(3, 3, 20, 24), visible=visible())
    x = drawn(model).float()
    for wrong in (visible()[:2], visible()[:, :4], visible().float()):
        with pytest.raises(ValueError, match=r"`visible` must be bool \(3, 6\)"):
            model(x, visible=wrong)
