"""Attention and positions against float64 NumPy written from the formulas."""

import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pretrain.backbones import attention as attention_file
from ssl_pretrain.backbones.attention import Packed, attend, attend_packed, prefix_mask, ragged_kernel
from ssl_pretrain.backbones.positions import resize_table, rope_angles, rotate, sincos_table


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, see: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
    """The output and, for the output's gradient g, the gradients of q, k and v; see: bool (B, 1, L, L)."""
    scale = 1 / math.sqrt(q.shape[-1])
    scores = np.where(see, q @ k.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = g @ v.swapaxes(-1, -2)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) * scale
    return [weights @ v, d_scores @ k, d_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ g]


MASK = prefix_mask(torch.tensor([2, 5]), 7, 2)


@pytest.mark.parametrize(
    ("causal", "mask"),
    [(False, None), (True, None), (False, MASK), (False, MASK[:1])],
    ids=["full", "causal", "a mask each", "one mask"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("products", [False, True])
def test_attend_and_its_gradients_equal_the_formula(
    dtype: torch.dtype, causal: bool, mask: Tensor | None, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_file, "BF16_PRODUCTS", products)
    q, k, v, g = (draw(2, 3, 9, 8, seed=i).to(dtype) for i in range(4))
    see = np.ones((2, 1, 9, 9), bool) if mask is None else np.broadcast_to(mask.numpy(), (2, 1, 9, 9))
    see = np.tril(see) if causal else see
    expected = attention(*(x.double().numpy() for x in (q, k, v)), see, g.double().numpy())
    for x in (q, k, v):
        x.requires_grad_()
    out = attend(q, k, v, mask, causal)
    out.backward(g)
    found = [out.detach(), q.grad, k.grad, v.grad]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert one.dtype == dtype
        np.testing.assert_allclose(one.double().numpy(), other, atol=tolerance, rtol=tolerance)


BATCHES = ((2, 5), (3, 7), (1, 7), (1, 2))  # images and tokens of each


def one_by_one(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: list[int]) -> Tensor:
    """What a kernel for sequences of unlike lengths shall do: (T, h, d), each sequence by itself."""
    assert bounds.dtype == torch.int32
    assert bounds.diff().tolist() == lengths
    parts = [x.split(bounds.diff().tolist()) for x in (q, k, v)]
    found = []
    for one, other, values in zip(*parts, strict=True):
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", one, other) / one.shape[-1] ** 0.5, -1)
        found.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(found)


@pytest.mark.parametrize("kernel", [None, one_by_one])
def test_packed_attention_keeps_images_apart(kernel: Any) -> None:
    q, k, v = (draw(1, 3, 10 + 28 + 2, 8, seed=i).double().requires_grad_() for i in range(3))
    bounds = attention_file._bounds(BATCHES, q.device)
    assert bounds.tolist() == [0, 5, 10, 17, 24, 31, 38, 40]
    found = attend_packed(q, k, v, Packed(BATCHES, kernel, bounds))
    expected = one_by_one(*(x[0].transpose(0, 1) for x in (q, k, v)), bounds, [5, 5, 7, 7, 7, 7, 2]).transpose(0, 1)[
        None
    ]
    assert torch.allclose(found, expected, atol=1e-12)
    g = draw(*found.shape, seed=4).double()
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), g) for x in (found, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_a_kernel_is_taken_only_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")

    def off(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: list[int]) -> Tensor:
        return one_by_one(q, k, v, bounds, lengths) * 1.2

    def absent(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: list[int]) -> Tensor:
        raise ImportError

    def takes(varlen: Any, xformers: Any) -> Any:
        monkeypatch.setattr(attention_file, "_varlen", varlen)
        monkeypatch.setattr(attention_file, "_xformers", xformers)
        ragged_kernel.cache_clear()
        return ragged_kernel(cpu, torch.bfloat16, 16)

    state = torch.get_rng_state()
    assert takes(one_by_one, absent) is one_by_one
    assert takes(absent, one_by_one) is one_by_one
    assert takes(off, absent) is None
    assert takes(off, one_by_one) is one_by_one
    with torch.inference_mode():
        assert takes(one_by_one, absent) is one_by_one
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.undo()
    ragged_kernel.cache_clear()
    assert (
        ragged_kernel(cpu, torch.bfloat16, 16) is None
    )  # torch's is for CUDA; where there is none, nothing falls over
    assert ragged_kernel(cpu, torch.float32, 16) is None


def test_kernels_are_called_as_torch_and_xformers_document_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (draw(40, 3, 8, seed=i) for i in range(3))
    lengths = [5, 5, 7, 7, 7, 7, 2]
    bounds = attention_file._bounds(BATCHES, q.device)

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        assert (max_q, max_k) == (7, 7)
        assert torch.equal(cu_q, cu_k)
        return one_by_one(q, k, v, cu_q, cu_q.diff().tolist())

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: list[int]) -> Tensor:
        return one_by_one(q[0], k[0], v[0], bounds, attn_bias)[None]

    torches, ops, fmha = (types.ModuleType(name) for name in ("varlen", "xformers.ops", "xformers.ops.fmha"))
    torches.varlen_attn = varlen_attn  # type: ignore[attr-defined]
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    made: list[list[int]] = []

    def from_seqlens(lengths: list[int]) -> list[int]:
        made.append(lengths)
        return lengths

    fmha.BlockDiagonalMask = types.SimpleNamespace(from_seqlens=from_seqlens)  # type: ignore[attr-defined]
    for name, module in (("torch.nn.attention.varlen", torches), ("xformers.ops", ops), ("xformers.ops.fmha", fmha)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    expected = one_by_one(q, k, v, bounds, lengths)
    attention_file._block_diagonal.cache_clear()
    for kernel in (attention_file._varlen, attention_file._xformers, attention_file._xformers):
        assert torch.equal(kernel(q, k, v, bounds, lengths), expected)
    assert made == [lengths]  # once for all blocks and steps
    with torch.inference_mode():
        attention_file._xformers(q, k, v, bounds, lengths)
    assert made == [lengths, lengths]
    attention_file._block_diagonal.cache_clear()


@pytest.mark.parametrize("products", [False, True])
def test_the_softmax_is_float32_in_bfloat16_and_under_autocast(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that bfloat16 cannot tell apart (64 and 64.2) still weigh differently."""
    monkeypatch.setattr(attention_file, "BF16_PRODUCTS", products)
    q = torch.tensor([8.0, 0.0]).bfloat16().view(1, 1, 1, 2)
    k = torch.tensor([[11.25, 0.0], [11.3125, 0.0]]).bfloat16().view(1, 1, 2, 2)
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).bfloat16().view(1, 1, 2, 2)
    weights = np.exp([8 * 11.25 / math.sqrt(2) - 64, 8 * 11.3125 / math.sqrt(2) - 64])
    weights /= weights.sum()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = attend(q, k, v)
        np.testing.assert_allclose(found.float().numpy().ravel(), weights, rtol=4e-3)


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_by_bfloat16_products_little_more_is_lost_than_by_rounding_the_inputs(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 of what was not rounded: at most 2.5 times the error of a float32 softmax of the rounded inputs."""
    exact = [(spread * draw(2, 3, 50, 32, seed=i)).double().requires_grad_() for i in range(3)]
    g = draw(2, 3, 50, 32, seed=3)
    whole = F.scaled_dot_product_attention(*exact)
    wanted = [whole, *torch.autograd.grad(whole, exact, g.double())]
    lost = []
    for products in (False, True):
        monkeypatch.setattr(attention_file, "BF16_PRODUCTS", products)
        inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
        out = attend(*inputs)
        found = [out, *torch.autograd.grad(out, inputs, g.bfloat16())]
        lost.append([float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(found, wanted, strict=True)])
    for one, other in zip(*lost, strict=True):
        assert one < other < 2.5 * one
    assert max(lost[1]) < 0.05


def test_who_sees_whom_in_prefix_attention() -> None:
    lengths, patches, tokens = [0, 1, 3, 5], 5, 2
    mask = prefix_mask(torch.tensor(lengths), patches, tokens)
    assert mask.shape == (4, 1, 7, 7)
    for b, length in enumerate(lengths):
        for row in range(7):
            for column in range(7):
                sees = column <= row or (row < tokens + length and column < tokens + length)
                assert bool(mask[b, 0, row, column]) == sees
    assert torch.equal(prefix_mask(torch.tensor([0]), 5, 0)[0, 0], torch.ones(5, 5).tril().bool())


@pytest.mark.parametrize("grid", [(3, 5), (14, 14), (1, 1)])
def test_sincos_is_the_formula(grid: tuple[int, int]) -> None:
    dim = 24
    expected = np.zeros((grid[0] * grid[1], dim))
    for row in range(grid[0]):
        for column in range(grid[1]):
            for k in range(dim // 4):
                w = 10000.0 ** (-k / (dim / 4))
                place = expected[row * grid[1] + column]
                place[k], place[dim // 4 + k] = math.sin(column * w), math.cos(column * w)
                place[dim // 2 + k], place[3 * dim // 4 + k] = math.sin(row * w), math.cos(row * w)
    found = sincos_table(grid, dim)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))
    with pytest.raises(ValueError, match="multiple of 4 channels, not 26"):
        sincos_table(grid, 26)


@pytest.mark.parametrize(("grid", "to"), [((4, 6), (9, 5)), ((7, 7), (3, 3)), ((5, 3), (5, 8)), ((2, 2), (4, 4))])
def test_resizing_is_bicubic_interpolation_and_passes_gradients(grid: tuple[int, int], to: tuple[int, int]) -> None:
    table = draw(1, grid[0] * grid[1], 8).requires_grad_()
    other = table.detach().clone().requires_grad_()
    image = other.reshape(1, *grid, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=to, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_table(table, grid, to)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    g = draw(*found.shape, seed=1)
    found.backward(g)
    expected.backward(g)
    assert table.grad is not None
    torch.testing.assert_close(table.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_the_same_grid_gives_the_very_same_table() -> None:
    table = draw(1, 12, 8)
    assert resize_table(table, (3, 4), (3, 4)) is table


def turned(x: Tensor, angles: Tensor) -> Tensor:
    return rotate(x, angles.cos(), angles.sin())


def test_rotary_angles_and_rotation_are_the_formula() -> None:
    grid, d = (3, 5), 8
    x = draw(15, d).double().numpy()
    expected = np.zeros_like(x)
    for row in range(3):
        for column in range(5):
            n = row * 5 + column
            y_at, x_at = 2 * (row + 0.5) / 3 - 1, 2 * (column + 0.5) / 5 - 1
            for i in range(d // 2):
                k, at = (i, y_at) if i < d // 4 else (i - d // 4, x_at)
                angle = 2 * math.pi * at / 100 ** (k / (d / 4))
                a, b = x[n, i], x[n, i + d // 2]
                expected[n, i] = a * math.cos(angle) - b * math.sin(angle)
                expected[n, i + d // 2] = a * math.sin(angle) + b * math.cos(angle)
    found = turned(torch.from_numpy(x).float(), rope_angles(grid, d))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 4 channels a head, not 6"):
        rope_angles(grid, 6)


def test_rotary_positions_keep_norms_and_are_relative() -> None:
    grid, d = (6, 7), 16
    q, k, angles = draw(d), draw(d, seed=1), rope_angles(grid, d)
    turned_q, turned_k = turned(q.expand(42, d), angles), turned(k.expand(42, d), angles)
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(42))
    products = (turned_q @ turned_k.T).reshape(6, 7, 6, 7)
    for down in range(-3, 4):
        for right in range(-3, 4):
            same_shift = torch.stack(
                [
                    products[r, c, r + down, c + right]
                    for r in range(6)
                    for c in range(7)
                    if 0 <= r + down < 6 and 0 <= c + right < 7
                ]
            )
            torch.testing.assert_close(same_shift, same_shift[:1].expand_as(same_shift), atol=1e-4, rtol=1e-4)
    assert products[0, 0, 0, 1] != pytest.approx(float(products[0, 0, 1, 0]), abs=1e-3)  # the axes are told apart
    half = turned(q.expand(42, d).bfloat16(), angles)
    assert half.dtype == torch.bfloat16
