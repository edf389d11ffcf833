"""SemAIM: its orders, its two streams' blindness to what comes later, its loss and gradient against float64 NumPy."""

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_zero_
from ssl_pretrain.methods.semaim import CrossBlock, SemAIM
from torch import nn

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.pretext import Batch, Step

KERNELS = 181  # of a step: python tests/kernels.py semaim
DEVICE_KERNELS = 196  # with the optimiser, on an accelerator: python tests/device.py semaim


def build(size: tuple[int, int] = (32, 48), options: dict | None = None, **knobs: object) -> SemAIM:
    torch.manual_seed(0)
    chosen = {**backbones.defaults("vit_micro"), "dim": 32, "patch_size": 8, "depth": 2, **SemAIM.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=size, **{**chosen, **(options or {})})
    small = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4, **knobs}
    return SemAIM(encoder, SemAIM.Config(**small)).double()


def step(batch: int = 4, noise: int = 1) -> Step:
    where = {"rows": slice(0, batch), "batch_size": batch, "device": torch.device("cpu")}
    return Step(step=0, total=10, noise=noise, **where)


def images(batch: int = 4, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def a_batch(x: torch.Tensor) -> Batch:
    return Batch(views={"image": x}, index=torch.arange(len(x)))


# ---- Orders


@pytest.mark.parametrize("options", [{}, {"cls": True, "pool": "cls"}])
def test_the_semantic_order_falls_in_similarity_with_the_patch_most_like_the_image(options: dict) -> None:
    method, x = build(options=options), images()
    with torch.no_grad():
        features = method.encoder(x)
    found = method.order(x, step()).numpy()
    for i in range(4):
        patches, whole = features.patches[i].numpy(), features.pooled[i].numpy()
        patches = patches / np.linalg.norm(patches, axis=1, keepdims=True)
        centre = int(np.argmax(patches @ whole))
        assert found[i, 0] == centre
        assert sorted(found[i]) == list(range(24))
        similarity = patches @ patches[centre]
        assert (np.diff(similarity[found[i]]) < 1e-6).all()
    assert len({tuple(row) for row in found}) == 4


def test_the_other_orders() -> None:
    x = images(64, (24, 24))
    raster = build((24, 24), order="raster").order(x, step(64))
    assert torch.equal(raster, torch.arange(9).expand(64, -1))
    centre = build((24, 24), order="centre").order(x, step(64))
    assert centre[0].tolist() == [4, 1, 3, 5, 7, 0, 2, 6, 8]
    assert torch.equal(centre, centre[:1].expand(64, -1))
    oblong = build((16, 32), order="centre").order(images(1, (16, 32)), step(1))
    assert set(oblong[0, :4].tolist()) == {1, 2, 5, 6}
    random = build((24, 24), order="random").order(images(900, (24, 24)), step(900)).numpy()
    for place in range(9):
        counts = np.bincount(random[:, place], minlength=9)
        assert (np.sort(random, axis=1) == np.arange(9)).all()
        assert ((counts - 100) ** 2 / 100).sum() < 26.1  # 99.9 % of chi-square with 8 degrees of freedom


# ---- Streams


def test_cross_attention_against_numpy() -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, heads=2).double().requires_grad_(False)
    for part in (block.q, block.kv, block.proj):
        nn.init.normal_(part.weight)
        nn.init.normal_(part.bias)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    x, content = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 8).double()

    def linear(part: nn.Linear, y: np.ndarray) -> np.ndarray:
        return y @ part.weight.numpy().T + part.bias.numpy()

    def norm(y: np.ndarray) -> np.ndarray:
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)

    for b in range(2):
        q, kv = linear(block.q, norm(x[b].numpy())), linear(block.kv, norm(content[b].numpy()))
        out = np.zeros((5, 8))
        for head in (0, 1):
            part = slice(4 * head, 4 * head + 4)
            k, v = kv[:, :8][:, part], kv[:, 8:][:, part]
            for i in range(5):
                score = np.exp(q[i, part] @ k[: i + 1].T / 2)
                out[i, part] = score @ v[: i + 1] / score.sum()
        np.testing.assert_allclose(block(x, content)[b].numpy(), x[b].numpy() + linear(block.proj, out), atol=1e-9)


def test_a_prediction_depends_on_all_earlier_patches_and_on_no_later_one() -> None:
    method, x = build(), images(1)
    for part in method.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.2)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))[None]
    with torch.no_grad():
        before = method.predict(x, order, step(1))
        for place in (0, 1, 11, 23):
            r, c = divmod(int(order[0, place]), 6)
            other = x.clone()
            other[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] += torch.randn(3, 8, 8)
            changed = (method.predict(other, order, step(1)) != before).any(-1)[0]
            # Prediction j is of the patch at place j + 1: it may look at the places 0 to j.
            assert not changed[:place].any()
            assert changed[place:].all()


def test_a_query_knows_where_its_patch_is() -> None:
    method, x = build(), images(1)
    order = torch.arange(24)[None]
    swapped = order.clone()
    swapped[0, [22, 23]] = order[0, [23, 22]]
    with torch.no_grad():
        a, b = method.predict(x, order, step(1)), method.predict(x, swapped, step(1))
    assert torch.equal(a[:, :21], b[:, :21])
    assert not torch.allclose(a[:, 21], b[:, 21])  # from the same content, of another place


# ---- Loss


def numpy_blur(x: np.ndarray, kernel: int, sigma: float) -> np.ndarray:
    half = kernel // 2
    line = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    padded = np.pad(x, ((0, 0), (0, 0), (half, half), (half, half)), mode="reflect")
    out = np.zeros_like(x)
    for r in range(kernel):
        for c in range(kernel):
            out += weights[r, c] * padded[:, :, r : r + x.shape[2], c : c + x.shape[3]]
    return out


@pytest.mark.parametrize("knobs", [{}, {"norm_pix": False}, {"blur_kernel": 1}, {"blur_kernel": 5, "blur_sigma": 2.0}])
def test_loss_and_gradient_against_numpy(knobs: dict) -> None:
    method, x = build(**knobs), images()
    found = method(a_batch(x), step())
    found.total.backward()
    order = method.order(x, step())
    with torch.no_grad():
        predicted = method.predict(x, order, step()).numpy()
    target = numpy_blur(x.numpy(), knobs.get("blur_kernel", 9), knobs.get("blur_sigma", 1.0))
    error = np.empty(predicted.shape)
    for i in range(4):
        for j in range(23):
            r, c = divmod(int(order[i, j + 1]), 6)
            patch = target[i, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].transpose(1, 2, 0).flatten()
            if method.config.norm_pix:
                patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            error[i, j] = predicted[i, j] - patch
    assert float(found.total.detach()) == pytest.approx((error**2).mean(), rel=1e-5)
    np.testing.assert_allclose(found.per_sample.numpy(), (error**2).mean((1, 2)), rtol=1e-5)
    gradient = 2 * error.sum((0, 1)) / error.size
    np.testing.assert_allclose(method.decoder_pred.bias.grad.numpy(), gradient, rtol=1e-4, atol=1e-7)


def test_collapsed_state_has_the_stated_loss() -> None:
    """The mean colour is zero where the target is normalised; in plain pixels the loss depends on the images."""
    method = one_step.build("semaim", norm_pix=True)
    make_zero_(method.decoder_pred)
    check_stated(method, {"loss": losses_of(method)})
    assert one_step.build("semaim", norm_pix=False).collapsed(one_step.BATCH) == {}


def test_pictures_show_the_order_and_the_first_patch() -> None:
    method, x = build(order="centre"), images()
    shown = method.pictures(a_batch(x), step())
    assert list(shown) == ["input", "order", "prediction"]
    first, last = (divmod(int(method.order(x, step())[0, place]), 6) for place in (0, -1))
    for (r, c), value in ((first, 1.0), (last, -1.0)):
        assert (shown["order"][:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] == value).all()
    r, c = first
    blurred = torch.from_numpy(numpy_blur(x.numpy(), 9, 1.0))[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
    torch.testing.assert_close(
        shown["prediction"][:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].double(), blurred, rtol=1e-4, atol=1e-5
    )


def test_other_image_sizes_than_the_configured_one() -> None:
    assert torch.isfinite(build().float()(a_batch(images(2, (48, 32)).float()), step(2)).total)


@pytest.mark.parametrize(
    "knobs",
    [{"decoder_dim": 30}, {"decoder_heads": 5}, {"decoder_depth": 0}, {"blur_kernel": 4}, {"blur_kernel": 65},
     {"blur_sigma": 0.0}, {"size": (8, 8)}],
)  # fmt: skip
def test_knobs_that_cannot_be(knobs: dict) -> None:
    with pytest.raises(UserError, match="--"):
        build(**knobs)
