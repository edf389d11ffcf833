"""Micro-batches of a whole-batch loss: equal to the big batch in loss, gradients and noise, and refused where they could
not be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import losses

from ssl_pretrain.conformance.one_step import batch, build, one_step, two_processes
from ssl_pretrain.loop import grad_cache
from ssl_pretrain.pretext import Step


def step(rows: slice) -> Step:
    return Step(step=3, total=10, noise=7, rows=rows, batch_size=16, device=torch.device("cpu"))


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_any_number_of_parts_gives_the_gradients_of_the_whole(parts: int) -> None:
    whole = build("simclr").double()
    images = batch(whole, slice(0, 16))
    images.views = {"view": images.views["view"].double()}
    expected = whole(images, step(slice(0, 16)))
    expected.total.backward()

    method = build("simclr").double()
    cut = []
    for i in range(parts):
        rows = slice(i * 16 // parts, (i + 1) * 16 // parts)
        part = batch(method, rows)
        part.views = {"view": part.views["view"].double()}
        cut.append((part, step(rows)))
    found = grad_cache.backward(method, cut, torch.autocast("cpu", enabled=False), list(method.parameters()))  # type: ignore[arg-type]
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(found.per_sample, expected.per_sample)
    for (name, p), (_, q) in zip(method.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_parts_on_two_processes_give_the_gradients_of_one() -> None:
    """DDP knows nothing of the two passes: the gradients are averaged over the processes here."""
    found, one = two_processes().one_step("simclr", 2), one_step("simclr")
    torch.testing.assert_close(found["loss"], one["loss"])
    for name, gradient in one["gradients"].items():
        # A sum of large terms that cancel carries their rounding.
        rounding = 1e-6 + 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=rounding)


def test_drop_path_meets_the_same_noise_in_both_passes_and_in_one() -> None:
    """A second pass with other noise would give gradients of another function."""
    gradients = []
    for parts in (1, 4):
        torch.manual_seed(0)
        method = build("lejepa")
        method.encoder.config = type(method.encoder.config)(**{**vars(method.encoder.config), "drop_path": 0.5})
        cut = []
        for i in range(parts):
            rows = slice(i * 16 // parts, (i + 1) * 16 // parts)
            cut.append((batch(method, rows), step(rows)))
        if parts == 1:
            method(*cut[0]).total.backward()
        else:
            grad_cache.backward(method, cut, torch.autocast("cpu", enabled=False), list(method.parameters()))  # type: ignore[arg-type]
        gradients.append([p.grad for p in method.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_command_accumulates_a_whole_batch_loss_without_changing_it(
    photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    curves = []
    for parts in (1, 2):
        out = tmp_path / str(parts)
        argv = ["--method", "simclr", "--data", photos, "--out", out, "--steps", 3, "--log-every", 1, "--workers", 0]
        argv += ["--encoder", "vit_micro", "--image-size", 32, "--patch-size", 8, "--depth", 2, "--batch-size", 16]
        argv += ["--hidden-dim", 64, "--accumulate", parts, "--optimizer", "adamw", "--lr", "1e-3"]
        argv += ["--precision", "fp32"]
        pretrain(*argv)
        curves.append(losses(out))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
