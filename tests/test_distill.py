"""Cross-entropies of masked patches against float64 NumPy."""

import numpy as np
import pytest
import torch

from ssl_pretrain.backbones.backbone import Features
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.distill import class_token, cross_entropy_of_patches

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
