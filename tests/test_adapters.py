"""--adapters lora: what is trained, what is exported, and that both are the same encoder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from method_helpers import tiny_flags
from ssl_pretrain.launch.pretrain import main, read_command

from ssl_pretrain import backbones, checkpoint, encoder, optim, plugins, pretext, rates
from ssl_pretrain.backbones import adapters
from ssl_pretrain.backbones.token_stem import TokenStem
from ssl_pretrain.conformance.one_step import network_flags, tiny_knobs
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop import updates
from ssl_pretrain.loop.start_weights import OF_TRAINING

COMMON = (
    "--batch-size 16 --monitor-every 0 --picture-every 0 --precision fp32 --no-score --workers 0 --log-every 1"
).split()
LORA = "--adapters lora --lora-rank 4 --lora-alpha 8".split()
SIZES = {"dim": 64, "depth": 3, "heads": 2, "patch_size": 8}
MATRICES = sorted(f"blocks.{i}.attn.{part}.weight" for i in range(3) for part in ("proj", "qkv"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with random weights."""
    out = tmp_path_factory.mktemp("start")
    how = encoder.Preprocessing.for_size((32, 32), (0.5,) * 3, (0.25,) * 3)
    encoder.save(out, encoder.Encoder(encoder._build("vit_micro", (32, 32), 3, SIZES), "vit_micro", how, {}))
    return out


def trained(folder: Path, start: Path, method: str, *more: str) -> dict[str, Any]:
    """Train two steps; the state of the checkpoint."""
    argv = ["--method", method, *tiny_flags(method), *COMMON, "--init-from", str(start), "--out", str(folder), *LORA]
    assert main([*argv, "--steps", "2", "--warmup-steps", "0", "--lr", "1e-2", *more]) == 0
    return checkpoint.load(folder / "checkpoints", 2)


def test_low_rank_updates_by_their_definition() -> None:
    """The features with updates are those of weights W + alpha / r * B A."""
    plain, adapted = (encoder._build("vit_micro", (32, 32), 3, SIZES) for _ in range(2))
    said = adapters.train_updates(adapted, 4, 8.0, 0, torch.Generator().manual_seed(0))
    assert said.startswith("LoRA of rank 4 on 6 matrices: 4,608 of the encoder's values are trained, its own ")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(plain.eval()(images).pooled, adapted.eval()(images).pooled)  # nothing yet
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        state, weights = adapted.state_dict(), plain.state_dict()
        for name in MATRICES:
            inner = name.removesuffix("weight") + "parametrizations.weight."
            weights[name] = weights[name] + 8 / 4 * state[f"{inner}0.up"] @ state[f"{inner}0.down"]
        plain.load_state_dict(weights)
        expected = plain(images).patches
        torch.testing.assert_close(adapted(images).patches, expected, atol=1e-5, rtol=1e-5)
        merged = encoder._build("vit_micro", (32, 32), 3, SIZES, seed=7)
        adapters.merge_into(merged, adapted)
    torch.testing.assert_close(merged(images).patches, expected, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == weights.keys()


def test_an_export_that_is_not_the_same_is_not_written() -> None:
    adapted = encoder._build("vit_micro", (32, 32), 3, SIZES)
    adapters.train_updates(adapted, 4, 8.0, 0, torch.Generator().manual_seed(0))
    other = encoder._build("vit_micro", (32, 32), 3, {**SIZES, "heads": 4})
    with pytest.raises(RuntimeError, match="differs from the trained encoder by"):
        adapters.merge_into(other, adapted)


CONVNETS_ONLY = {"spark"}  # these have no attention to update


@pytest.mark.parametrize("method", [m for m in plugins.names("ssl_pretrain.methods") if m not in CONVNETS_ONLY])
def test_every_method_trains_updates_and_exports_a_plain_encoder(
    method: str, start: Path, photos_in_classes: Path, tmp_path: Path
) -> None:
    kind = pretext.load(method)
    networks = network_flags(kind, tiny_knobs(kind), tmp_path)
    state = trained(tmp_path / "run", start, method, "--data", str(photos_in_classes), *networks)
    before, after = (encoder.load(path).backbone for path in (start, tmp_path / "run"))
    one = before.state_dict()
    if isinstance(
        after, TokenStem
    ):  # the ViT behind a tokenizer: its table of ids is new, and igpt exports its first half
        two = after.vit.state_dict()
        one = {name: one[name] for name in two if not name.startswith("patch_embed.")}
    else:
        two = after.state_dict()
        assert {name for name, value in before.describe().items() if after.describe()[name] != value} <= OF_TRAINING
        assert one.keys() == two.keys()
    assert sorted(name for name in one if not torch.equal(one[name], two[name])) == [m for m in MATRICES if m in one]
    # The encoder's own weights are as before, and the optimiser knows nothing of them.
    own = {n.removeprefix("encoder."): v for n, v in state["method"].items() if n.startswith("encoder.")}
    for name, value in one.items():
        inner = name.removesuffix("weight") + "parametrizations.weight.original" if name in MATRICES else name
        assert torch.equal(own[inner], value), name
    steps = {name for name in state["optimizer"] if name.startswith("encoder.")}
    new = ("encoder.patch_embed.",) if isinstance(after, TokenStem) else ()
    assert steps
    assert all(".parametrizations.weight.0." in name or name.startswith(new) for name in steps)


def test_a_resumed_run_is_the_same_and_checkpoints_export_too(start: Path, photos: Path, tmp_path: Path) -> None:
    more = ["--data", str(photos), "--checkpoint-every", "1", "--keep-every", "1"]
    whole = trained(tmp_path / "whole", start, "dino", *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000002")
    shutil.rmtree(tmp_path / "cut" / "encoder")
    cut = trained(tmp_path / "cut", start, "dino", *more)
    for part in ("method", "optimizer"):
        assert all(torch.equal(value, cut[part][name]) for name, value in whole[part].items())
    one, two = (encoder.load(tmp_path / name).backbone.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    # The teacher is the EMA of the updates.
    teacher = "teacher.encoder.blocks.0.attn.qkv.parametrizations.weight.0.up"
    assert 0 < whole["method"][teacher].norm() < whole["method"][teacher.removeprefix("teacher.")].norm()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(
    parallel: str, start: Path, photos: Path, tmp_path: Path, pretrain: Callable[..., Any]
) -> None:
    one = trained(tmp_path / "one", start, "dino", "--data", str(photos))
    argv = ["--method", "dino", *tiny_flags("dino"), *COMMON, "--init-from", start, "--out", tmp_path / "two", *LORA]
    argv += ["--steps", 2, "--warmup-steps", 0, "--lr", "1e-2", "--data", photos, "--checkpoint-every", 1]
    pretrain(*argv, "--nproc", 2, "--parallel", parallel)
    two = checkpoint.load(tmp_path / "two" / "checkpoints", 2)
    for name, value in one["method"].items():
        torch.testing.assert_close(two["method"][name], value, atol=2e-4, rtol=1e-3)
    merged, again = (encoder.load(tmp_path / name).backbone.state_dict() for name in ("one", "two"))
    for name, value in merged.items():
        torch.testing.assert_close(again[name], value, atol=2e-4, rtol=1e-3)


def test_last_blocks_and_norms_may_be_trained_too(start: Path, photos: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", start, "mae", "--data", str(photos), "--adapters-unfreeze", "1")
    one, two = (encoder.load(path).backbone.state_dict() for path in (start, tmp_path / "run"))
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    norms = {name for name in one if "norm" in name}
    last = {name for name in one if name.startswith("blocks.2.")}
    assert changed == norms | last | set(MATRICES[:4])


def test_updates_have_no_weight_decay_and_are_no_matrices_for_muon(start: Path, photos: Path) -> None:
    run, _, _ = read_command(
        ["--method", "mae", *COMMON, "--init-from", str(start), "--data", str(photos), *LORA, "--optimizer", "muon"]
    )
    model = encoder._build("vit_micro", (32, 32), 3, SIZES)
    updates.add(run, model)  # type: ignore[arg-type]
    rules = updates.rates(run)  # type: ignore[arg-type]
    groups = optim.parameter_groups(model, model, rule="no_1d", matrices=True, rates=rules)
    assert sum(len(group["names"]) for group in groups) == 12
    optimizer = optim.build("adamw", groups, (0.9, 0.99))
    optim.set_rates(optimizer, 1e-3, 0.05, 0.5)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert {group["matrices"] for group in groups} == {False}
    rates.check(rules, [name for name, p in model.named_parameters() if p.requires_grad])


def test_they_have_a_learning_rate_of_their_own(start: Path, photos: Path, tmp_path: Path) -> None:
    argv = ["--method", "mae", *tiny_flags("mae"), *COMMON, "--init-from", str(start), "--data", str(photos)]
    assert main([*argv, *LORA, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (recorded["lr"], recorded["adapters"], recorded["lora_rank"]) == (2e-4, "lora", 4)
    assert encoder.load(tmp_path / "run").lineage["adapters"] == "lora of rank 4, merged"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--adapters lora", "name these with --init-from"),
        (
            "--adapters lora --init-from {start} --lora-rank 65",
            "--lora-rank is 65, and the attention matrices are 64 x",
        ),
        ("--adapters lora --init-from {start} --lora-rank 0", "--lora-rank is 0; it must be at least 1"),
        ("--adapters lora --init-from {start} --adapters-unfreeze 4", "the encoder has 3 blocks"),
    ],
)
def test_a_mistake_is_named(
    flags: str, message: str, start: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--method", "mae", *COMMON, "--data", str(photos), "--out", str(tmp_path / "run"), "--steps", "1"]
    assert main([*argv, *flags.format(start=start).split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resnet18", "convnext_micro"])
def test_a_convnet_is_refused(name: str) -> None:
    model = backbones.build(name, image_size=(32, 32))
    with pytest.raises(UserError, match=r"has no attention matrices; a ViT \(--encoder vit_small\) has"):
        adapters.train_updates(model, 4, 4.0, 0, torch.Generator())
