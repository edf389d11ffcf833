"""Muon beside AdamW: each does to its own parameters what torch's own optimiser does alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import TINY, losses

from ssl_pretrain import checkpoint, optim


def parameters() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((6, 4), (6,)))  # type: ignore[return-value]


def groups(w: torch.nn.Parameter, b: torch.nn.Parameter) -> list[dict]:
    return [
        {"params": [w], "names": ["w"], "decays": True, "lr_scale": 1.0, "matrices": True, "weight_decay": 0.0},
        {"params": [b], "names": ["b"], "decays": False, "lr_scale": 1.0, "matrices": False, "weight_decay": 0.0},
    ]


def test_matrices_get_muon_the_rest_adamw_and_a_bad_step_neither() -> None:
    w, b = parameters()
    w1, b1 = parameters()
    both = optim.build("muon", groups(w, b), (0.9, 0.95))
    muon = torch.optim.Muon([w1], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([b1], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        grads = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
        optim.set_rates(both, 0.01, 0.1)
        if number == 2:
            w.grad, b.grad = torch.full_like(w, float("nan")), torch.full_like(b, float("nan"))
            optim.step_unless(torch.tensor(1.0), both)
            continue
        for p, grad in zip((w, b, w1, b1), grads * 2, strict=True):
            p.grad = grad.clone()
        optim.step_unless(torch.tensor(0.0), both)
        muon.step()
        adamw.step()
    torch.testing.assert_close(w, w1)
    torch.testing.assert_close(b, b1)


def test_a_run_with_it_resumes_bit_for_bit(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    out = tmp_path / "run"
    argv = ["--method", "mae", "--data", photos, "--out", out, "--steps", 6, "--log-every", 1, "--checkpoint-every", 3]
    argv += [*TINY, "--workers", 0, "--optimizer", "muon", "--lr", "1e-3"]
    pretrain(*argv)
    curve, folder = losses(out), out / "checkpoints"
    assert curve[6] < curve[1]
    whole = {n: v.clone() for n, v in checkpoint.load(folder, 6)["method"].items()}
    state = checkpoint.load(folder, 6)["optimizer"]
    assert "encoder.blocks.0.attn.qkv.weight/momentum_buffer" in state
    assert "decoder_embed.weight/exp_avg" in state
    shutil.rmtree(folder / "step-00000006")
    pretrain(*argv)
    assert all(torch.equal(v, whole[n]) for n, v in checkpoint.load(folder, 6)["method"].items())
    assert losses(out) == curve
