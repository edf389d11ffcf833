"""Numbers that cannot be: every flag of the run, of a method and of an encoder refuses them, in one line that names it."""

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from ssl_pretrain.launch.pretrain import main, read_command

from ssl_pretrain import backbones, config, flags, plugins, pretext
from ssl_pretrain.config import BUILT_IN_RUN, Run
from ssl_pretrain.errors import UserError

METHODS = plugins.own("ssl_pretrain.methods")
ENCODERS = ("vit_micro", "resnet18", "convnext_micro", "swin_micro", "hiera_micro")


@pytest.mark.parametrize(
    "words",
    [
        "--workers -1",
        "--betas 2 3",
        "--betas 0.9 1",
        "--lr -1",
        "--lr nan",
        "--lr inf",
        "--final-lr -1",
        "--warmup-steps -3",
        "--cooldown-steps -5",
        "--schedule-stretch 0.5",
        "--milestones 0.5 1.2",
        "--step-factor 2",
        "--weight-decay -1",
        "--final-weight-decay -1",
        "--clip-grad -1",
        "--clip-grad 0",
        "--layer-decay -1",
        "--layer-decay 75",
        "--epochs 0",
        "--epochs nan",
        "--images 0",
        "--steps 0",
        "--batch-size 0",
        "--accumulate 0",
        "--in-chans 0",
        "--image-size 0",
        "--image-size 1 2 3",
        "--mean 123.7 116.3 103.5",
        "--std 0 0 0",
        "--std 58.4 57.1 57.4",
        "--shard-size 0",
        "--stall-after -1",
        "--checkpoint-every 0",
        "--keep-last 0",
        "--keep-every -1",
        "--log-every 0",
        "--monitor-every -1",
        "--picture-every -1",
        "--val-images -1",
        "--val-every 0",
        "--knn-every -1",
        "--bad-steps 0",
        "--subset 0",
        "--subset -5",
        "--subset 2.5",
        "--mask-ratio nan",
        "--decoder-heads 0",
        "--decoder-dim 0",
        "--crop-scale -1 0",
        "--crop-scale 2 1",
        "--crop-scale 1 0.2",
        "--layer-scale nan",
        "--drop-path 1",
        "--mlp-ratio inf",
    ],
)
def test_a_number_out_of_range_gets_one_line_and_exit_code_2(
    words: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    short = [] if words.startswith(("--epochs", "--images")) else ["--steps", "1"]
    out = tmp_path / "run"
    assert main(["--method", "mae", "--data", str(photos), "--out", str(out), *short, *TINY, *words.split()]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert words.split(maxsplit=1)[0] in said[0]
    assert not (out / "config.yaml").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--lr 0 --final-lr 0",
        "--weight-decay 0 --warmup-steps 0 --betas 0 0",
        "--clip-grad none --layer-decay 0.75",
        "--monitor-every 0 --picture-every 0 --knn-every 0 --stall-after 0 --workers 0 --val-images 0",
        "--mean 0 0 0 --std 1 1 1 --crop-scale 1 1",
        "--layer-scale none --drop-path 0 --registers 0",
        "--seed -1",
    ],
)
def test_numbers_that_mean_something_are_taken(words: str) -> None:
    assert read_command(["--method", "mae", *words.split()])


@pytest.mark.parametrize("text", ["method: 3", "method: [mae]", "method: mae\ndata: 3", "method: mae\nencoder: {}",
                                  "method: mae\nlr: .nan", "method: mae\ncrop_scale: [2, 1]"])  # fmt: skip
def test_so_does_a_value_in_yaml(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main(["--config", str(recipe), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert text.splitlines()[-1].split(":")[0].replace("_", "-") in said[0].replace("_", "-")


def _numbers(kind: type) -> list[tuple[str, Any]]:
    """The fields of numbers, each with what it can never be: a count below 0, and anything else that is not a number."""
    found: list[tuple[str, Any]] = []
    for name, hint in typing.get_type_hints(kind).items():
        hint = next((a for a in typing.get_args(hint) if a is not type(None)), hint) if type(None) in typing.get_args(
            hint
        ) else hint  # fmt: skip
        parts = typing.get_args(hint) if typing.get_origin(hint) is tuple else (hint,)
        if parts[0] not in (int, float):
            continue
        bad = -1 if parts[0] is int else math.nan
        found.append((name, (bad,) * (2 if parts[-1] is Ellipsis else len(parts)) if hint is not parts[0] else bad))
    return found


RUN = [("the run", Run, {"method": "mae"})]
OF_METHODS = [(name, pretext.load(name).Config, {}) for name in METHODS]
OF_ENCODERS = [(name, backbones.config_class(name), backbones.defaults(name)) for name in ENCODERS]


@pytest.mark.parametrize(
    ("kind", "given", "field", "bad"),
    [
        pytest.param(kind, given, field, bad, id=f"{name}-{field}")
        for name, kind, given in [*RUN, *OF_METHODS, *OF_ENCODERS]
        for field, bad in _numbers(kind)
        # any number is a seed; a block is compared with those of the teacher and the encoder (tests/test_featmim.py,
        # tests/test_maelite.py)
        if field not in ("seed", "subset_seed", "target_block", "teacher_block", "student_block")
    ],
)
def test_every_number_has_its_range(kind: type, given: dict[str, Any], field: str, bad: Any) -> None:
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} "):
        kind(**{**given, field: bad})


def test_a_range_of_a_pair() -> None:
    @dataclasses.dataclass(frozen=True)
    class Knobs:
        scale: tuple[float, float] | None = (0.2, 1.0)

    flags.within(Knobs(), flags.ABOVE_0_TO_1, "scale", ascending=True)
    flags.within(Knobs(None), flags.ABOVE_0_TO_1, "scale", ascending=True)
    with pytest.raises(
        UserError, match=re.escape("--scale is 1.0 0.5; each must be above 0 and at most 1, the smaller")
    ):
        flags.within(Knobs((1.0, 0.5)), flags.ABOVE_0_TO_1, "scale", ascending=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "3: 4", "\udcff"])
def test_a_runs_own_config_that_is_damaged_is_named(text: str, tmp_path: Path) -> None:
    written = tmp_path / "config.yaml"
    written.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.yaml.*another --out") as caught:
        config.read_recorded(written)
    assert "\n" not in str(caught.value)
    written.write_text("lr: 1.0e-3\nmethod: mae\ndata: '007'\n")
    assert config.read_recorded(written) == {"lr": 1e-3, "method": "mae", "data": "007"}


@pytest.mark.parametrize("name", METHODS)
def test_the_built_in_run_of_every_method_shows_pictures(name: str) -> None:
    run, _, _ = read_command(["--method", name])
    assert run.steps is not None
    assert 0 < run.picture_every <= run.steps
    assert run.picture_every == BUILT_IN_RUN["picture_every"]
