"""Large tables: memory is used again when nobody holds it, and never before."""

import mmap

import numpy as np
import pytest
import torch

from ssl_pretrain import memory

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large tables are mapped on Linux only")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_mapped", [])
    monkeypatch.setattr(memory, "LARGE", 4096)


def table(*shape: int) -> torch.Tensor:
    return memory.empty(*shape, dtype=torch.float32, device=CPU)


def test_what_somebody_holds_is_not_given_out_again() -> None:
    first, second = table(64, 32), table(64, 32)
    first.fill_(1)
    second.fill_(2)
    part = first[5:7]
    del first
    third = table(64, 32).fill_(3)
    assert (part == 1).all()
    assert (second == 2).all()
    array = part.numpy()
    del part
    fourth = table(64, 32).fill_(4)
    assert (array == 1).all()
    assert len({each.data_ptr() for each in (second, third, fourth)}) == 3
    assert len(memory._mapped) == 4


def test_what_a_graph_needs_is_held() -> None:
    factor = torch.ones(1, requires_grad=True)
    kept = table(64, 32).fill_(3)
    product = (kept * factor).sum()
    del kept
    table(64, 32).fill_(5)
    product.backward()
    assert factor.grad == 3 * 64 * 32


def test_memory_is_used_again_for_its_size_and_given_back_for_another() -> None:
    first = table(64, 32)
    place = first.data_ptr()
    del first
    again = memory.empty(32, 64, dtype=torch.float32, device=CPU)
    assert again.data_ptr() == place
    assert again.shape == (32, 64)
    del again
    other = table(64, 48)
    assert [len(each) for each in memory._mapped] == [other.numel() * 4]
    assert np.asarray(table(64, 48)).shape == (64, 48)


def test_small_tables_are_torchs_own() -> None:
    table(4, 4)
    assert memory._mapped == []
