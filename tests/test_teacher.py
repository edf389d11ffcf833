"""The teacher's step against its formula; what else there is of teachers is tested with the methods that have one."""

import pytest
import torch
from torch import nn

from ssl_pretrain.parts.ema_teacher import EncoderWithHeads, ema_copy, ema_update_

YES, NO = torch.tensor(True), torch.tensor(False)


def pair() -> tuple[EncoderWithHeads, EncoderWithHeads]:
    """A student of several dtypes with a batch norm, and its teacher; they differ."""
    student = EncoderWithHeads(
        {"encoder": nn.Linear(3, 5), "norm": nn.BatchNorm1d(5), "head": nn.Linear(5, 2).bfloat16()}
    )
    teacher = ema_copy(student)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        student["norm"].get_buffer("running_mean").add_(1)
    return teacher, student


def test_it_moves_by_the_share_of_the_difference_and_keeps_its_statistics() -> None:
    teacher, student = pair()
    before = {name: p.double() for name, p in teacher.named_parameters()}
    ema_update_(teacher, student, 0.75, YES)
    for (name, t), s in zip(teacher.named_parameters(), student.parameters(), strict=True):
        error = 1e-2 if t.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(t.double(), 0.75 * before[name] + 0.25 * s.double(), rtol=error, atol=error)
        assert not t.requires_grad
        assert t.grad_fn is None
    assert not teacher["norm"].get_buffer("running_mean").any()


def test_a_skipped_step_leaves_the_bits() -> None:
    teacher, student = pair()
    before = [p.clone() for p in teacher.parameters()]
    ema_update_(teacher, student, 0.75, NO)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))


def test_a_student_of_another_shape_is_refused() -> None:
    teacher, student = pair()
    with pytest.raises(ValueError, match="zip"):
        ema_update_(teacher, nn.Sequential(student, nn.Linear(2, 2)), 0.75, YES)
