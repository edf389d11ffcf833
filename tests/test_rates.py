"""`--rates` and `Method.rates`: parameters with a learning rate and weight decay of their own."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from ssl_pretrain.launch.pretrain import read_command

from ssl_pretrain import optim, rates
from ssl_pretrain.errors import UserError
from ssl_pretrain.rates import Rate


def test_learning_rate_is_zero_then_rises():
    rule = Rate("x", lr=0.5, start=0.2, ramp=0.1)
    assert [rule.lr_at(p) for p in (0.0, 0.199)] == [0.0, 0.0]
    assert rule.lr_at(0.25) == pytest.approx(0.25)
    assert rule.lr_at(0.31) == rule.lr_at(0.9) == 0.5
    assert Rate("x", start=0.2).lr_at(0.2) == 1.0


def test_factors_of_several_rules_multiply():
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    model["encoder"].depth, model["encoder"].layer_of = 1, lambda name: 2
    rules = rates.parse(["encoder.* lr=0.5 start=0.1", "*.weight lr=0.2 decay=3"])
    groups = optim.parameter_groups(model, model["encoder"], rule="all", rates=rules)
    optimizer = optim.build("adamw", groups, (0.9, 0.95))

    def found(progress: float) -> dict[str, tuple[float, float]]:
        optim.set_rates(optimizer, 2.0, 0.1, progress)
        groups = optimizer.param_groups
        return {name: (group["lr"], round(group["weight_decay"], 6)) for group in groups for name in group["names"]}

    assert found(0.05) == {
        "encoder.weight": (0.0, 0.3),
        "encoder.bias": (0.0, 0.1),
        "head.weight": (0.4, 0.3),
        "head.bias": (2.0, 0.1),
    }
    assert found(0.5)["encoder.weight"] == (pytest.approx(0.2), 0.3)
    assert found(0.5)["encoder.bias"] == (1.0, 0.1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "changes nothing"),
        ("encoder.*", "changes nothing"),
        ("encoder.* speed=1", "none of lr="),
        ("encoder.* lr", "none of lr="),
        ("encoder.* lr=fast", "not a number"),
        ("encoder.* start=1.5", r"in \[0, 1\]"),
        ("encoder.* lr=-1", "at least 0"),
    ],
)
def test_wrong_rules_are_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        rates.parse([text])


def test_frozen_phase_in_a_run(pretrain, tmp_path: Path):
    """The encoder stays at its start while its rate is 0, then it moves; heads move from the start."""
    short = ["--method", "simclr", "--steps", "8", "--batch-size", "16", "--checkpoint-every", "2", "--keep-last", "9"]
    short += ["--no-score", "--rates", "encoder.* start=0.5", "--warmup-steps", "0"]
    pretrain(*short, "--out", tmp_path / "run")
    states = {}
    for step in (2, 4, 8):
        folder = next((tmp_path / "run" / "checkpoints").glob(f"*{step}"))
        states[step] = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    encoder = [name for name in states[2] if name.startswith("method/encoder.")]
    heads = [n for n in states[2] if n.startswith("method/") and not n.startswith("method/encoder.") and "num" not in n]
    assert encoder
    assert heads
    assert all(torch.equal(states[2][name], states[4][name]) for name in encoder)
    assert not all(torch.equal(states[4][name], states[8][name]) for name in encoder)
    assert not any(torch.equal(states[2][name], states[4][name]) for name in heads)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rates"] == ["encoder.* start=0.5"]


def test_rule_that_fits_no_parameter_is_refused(pretrain, tmp_path: Path):
    command = ["--method", "simclr", "--steps", "2", "--batch-size", "8", "--rates", "encodr.* lr=0.1"]
    ended = pretrain(*command, "--out", tmp_path / "run", code=2)
    assert "fits no trained parameter" in ended.stderr


def test_optional_rule_may_fit_no_parameter():
    rules = rates.parse(["*.stem.* lr=0.2 optional", "*.missing lr=0.2"])
    assert [rule.optional for rule in rules] == [True, False]
    rates.check(rules[:1], ["encoder.conv1.weight"])
    with pytest.raises(UserError, match=r"'\*\.missing' fits no trained parameter"):
        rates.check(rules, ["encoder.conv1.weight"])


def test_message_about_a_rule_lists_few_names():
    with pytest.raises(UserError) as refused:
        rates.check(rates.parse(["zzz lr=0.2"]), [f"encoder.blocks.{i}.weight" for i in range(500)])
    assert len(str(refused.value)) < 500
    assert "encoder.blocks.0.weight" in str(refused.value)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("continue_*.yaml")), ids=lambda file: file.stem)
@pytest.mark.parametrize(
    ("encoder", "slowed"),
    [
        ("encoder.patch_embed.proj.weight", True),  # a ViT
        ("encoder.model.patch_embed.proj.weight", True),  # a ViT of timm
        ("encoder.stem.0.weight", False),  # a ConvNeXt
        ("encoder.blocks.0.attn.qkv.parametrizations.weight.0.up", False),  # updates of --adapters lora
    ],
)
def test_recipes_of_continued_pretraining_fit_every_encoder(recipe: Path, encoder: str, slowed: bool):
    rules = rates.parse(yaml.safe_load(recipe.read_text())["rates"])
    rates.check(rules, [encoder, "head.weight"])
    assert sum(rule.fits(encoder) for rule in rules) == 1 + slowed


def test_no_drop_path_is_true_of_an_encoder_that_has_none(tmp_path: Path):
    words = ["--config", "continue_dino", "--data", "fractals", "--encoder", "resnet18", "--out", str(tmp_path / "run")]
    run, knobs, options = read_command(words)
    assert (run.encoder, knobs.anchor) == ("resnet18", "gram")
    assert not hasattr(options, "drop_path")
    (tmp_path / "more.yaml").write_text("method: dino\nencoder: resnet18\ndrop_path: 0.1\n")
    with pytest.raises(UserError, match="unknown key 'drop_path'"):
        read_command(["--config", str(tmp_path / "more.yaml"), "--out", str(tmp_path / "run")])
