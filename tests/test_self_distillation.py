"""Cross-entropies of pairs of views and of masked patches against float64 NumPy and against autograd."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_pretrain import memory
from ssl_pretrain.backbones.backbone import Features
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.heads import Prototypes
from ssl_pretrain.parts.self_distillation import class_token, cross_entropy_of_pairs, cross_entropy_of_patches

COUNTED = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    return student, teacher.softmax(-1)


def by_loops(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    out = np.zeros(3)
    for r in range(3):
        masked = [m for m in range(4) if COUNTED[r, m]]
        for m in masked:
            p = np.exp(student[r, m] / temperature)
            out[r] -= (teacher[r, m] * np.log(p / p.sum())).sum() / len(masked)
    return out


def test_patches_value_and_gradient() -> None:
    student, teacher = example()
    student.requires_grad_()
    each = cross_entropy_of_patches(student, teacher, COUNTED, 0.3)
    np.testing.assert_allclose(each.detach().numpy(), by_loops(student.detach().numpy(), teacher.numpy(), 0.3), 1e-10)
    assert each[1] == 0
    each.mean().backward()
    # d/dl of -sum q log softmax(l / T) is (softmax(l / T) - q) / T, over the number of masked patches and crops.
    share = COUNTED.double() / COUNTED.sum(1, keepdim=True).clamp_min(1) / 3
    assert student.grad is not None
    expected = ((student / 0.3).softmax(-1) - teacher) / 0.3 * share[..., None]
    np.testing.assert_allclose(student.grad.numpy(), expected.detach().numpy(), rtol=1e-9, atol=1e-12)


def test_what_padding_holds_does_not_matter() -> None:
    student, teacher = example()
    other = torch.where(COUNTED[..., None], student, 100 * student + 7)
    nothing = torch.where(COUNTED[..., None], teacher, 0.0)
    found = cross_entropy_of_patches(other, nothing, COUNTED, 0.1)
    torch.testing.assert_close(found, cross_entropy_of_patches(student, teacher, COUNTED, 0.1))


def test_autocast_leaves_float32() -> None:
    student, teacher = (x.float() for x in example())
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropy_of_patches(student, teacher, COUNTED, 0.1)
    torch.testing.assert_close(found, cross_entropy_of_patches(student, teacher, COUNTED, 0.1), rtol=0, atol=0)


def test_an_encoder_without_a_class_token_is_told() -> None:
    none = Features(cls=None, patches=torch.zeros(1, 4, 2), grid=(2, 2), pooled=torch.zeros(1, 2))
    with pytest.raises(UserError, match=r"ibot .*--cls"):
        class_token(none, "ibot")


def plain_pairs(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """DINO's equation 3 as it stands, to be differentiated by autograd."""
    logs = torch.log_softmax(student / temperature, -1)
    pairs = [(t, s) for t in range(len(teacher)) for s in range(len(student)) if s != t]
    return torch.stack([-(teacher[t] * logs[s]).sum(-1) for t, s in pairs]).mean(0)


@pytest.mark.parametrize("cached", [1, 22, 10**6], ids=["one image", "two images", "all"])
def test_pairs_have_the_gradient_of_autograd_for_any_weights(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CACHED", cached)
    generator = torch.Generator().manual_seed(1)
    student = (3 * torch.randn(5, 7, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = torch.randn(3, 7, 11, generator=generator, dtype=torch.float64).mul(4).softmax(-1)
    weights = torch.randn(7, generator=generator, dtype=torch.float64)
    each, entropy = cross_entropy_of_pairs(student, teacher, 0.1)
    expected = plain_pairs(student, teacher, 0.1)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy, -(teacher * teacher.log()).sum(-1).mean())
    (found,) = torch.autograd.grad(each, student, weights)
    (wanted,) = torch.autograd.grad(expected, student, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_tables_that_get_huge_pages_hold_the_same_values() -> None:
    """From 32 MiB on their memory is mapped by hand."""
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(3, 2, 2**21 // 3 * 3, generator=generator)[..., : 2**21 - 5].requires_grad_()
    teacher = torch.rand(2, 2, 2**21 - 5, generator=generator)
    teacher /= teacher.sum(-1, keepdim=True)
    each, _ = cross_entropy_of_pairs(student, teacher, 0.5)
    (found,) = torch.autograd.grad(each.sum(), student)
    expected = plain_pairs(student, teacher, 0.5)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-10)


def test_a_second_backward_is_refused_and_not_wrong() -> None:
    student, teacher = example()
    student.requires_grad_()
    total = cross_entropy_of_pairs(student, teacher[:2], 0.5)[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


@pytest.mark.parametrize("loss", ["pairs", "patches"])
def test_bfloat16_and_autocast_are_computed_in_float32(loss: str) -> None:
    student, teacher = (x.bfloat16() for x in example())

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        if loss == "pairs":
            each = cross_entropy_of_pairs(x, teacher[:2], 0.1)[0]
        else:
            each = cross_entropy_of_patches(x, teacher, COUNTED, 0.1)
        each.sum().backward()
        assert x.grad is not None
        return each, x.grad

    with torch.autocast("cpu", torch.bfloat16):
        each, grad = both(student)
    assert each.dtype == torch.float32
    expected, wanted = both(student.float())
    torch.testing.assert_close(each, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, wanted.bfloat16(), rtol=0, atol=0)


def test_prototypes_are_a_linear_map_of_unit_rows_and_so_is_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = Prototypes(6, 50).double(), torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, 50, dtype=torch.float64)

    def plain() -> Tensor:
        rows = layer.weight / layer.weight.square().sum(1, keepdim=True).sqrt()
        return (x / x.square().sum(-1, keepdim=True).sqrt()) @ rows.T

    expected = torch.autograd.grad(plain(), (x, layer.weight), g)
    for cached in (2**18, 40):  # all rows together, and six of them
        monkeypatch.setattr(memory, "CACHED", cached)
        assert torch.allclose(layer(x), plain(), atol=1e-12)
        for one, other in zip(torch.autograd.grad(layer(x), (x, layer.weight), g), expected, strict=True):
            assert torch.allclose(one, other, atol=1e-12)
    frozen = torch.autograd.grad(layer(x, frozen=True), (x, layer.weight), g)
    assert torch.allclose(frozen[0], expected[0], atol=1e-12)
    assert not frozen[1].any()
    with torch.no_grad():
        layer.weight[7] = 0  # a row without direction stays without one, and its gradient is finite
    out = layer(x)
    assert not out[..., 7].any()
    assert torch.autograd.grad(out, layer.weight, g)[0].isfinite().all()
