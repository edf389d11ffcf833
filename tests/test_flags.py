"""Flags and YAML keys from dataclasses: values, help, and one-line errors with the nearest right word."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from ssl_pretrain.config import plain
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import parse


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run."""

    method: str
    """What to train with."""
    lr: float | None = None
    """Peak rate."""
    size: tuple[int, ...] = (224,)
    """Pixels; 50% of something."""
    betas: tuple[float, float] = (0.9, 0.95)
    out: Path | None = None
    precision: Literal["auto", "fp32"] = "auto"
    flip: bool = True


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """The method."""

    mask_ratio: float = 0.75
    """Share of patches removed."""


def read(*argv: str, **defaults: object) -> tuple[Run, Knobs]:
    run, knobs = parse([Run, Knobs], argv, defaults, prog="p", description="d")
    return run, knobs


def test_values_of_every_type() -> None:
    run, knobs = read(
        *"--method mae --lr 1e-3 --size 32 128 --betas 0.8 0.9 --out a/b".split(),
        *"--precision fp32 --no-flip --mask-ratio=0.5".split(),
    )
    assert run == Run(
        method="mae", lr=1e-3, size=(32, 128), betas=(0.8, 0.9), out=Path("a/b"), precision="fp32", flip=False
    )
    assert knobs == Knobs(mask_ratio=0.5)


def test_flags_win_over_yaml_over_defaults() -> None:
    run, knobs = read("--lr", "none", method="mae", lr=1, size=[64], mask_ratio=0.1)
    assert (run.lr, run.size, run.precision, knobs.mask_ratio) == (None, (64,), "auto", 0.1)
    assert read(method="mae", size=64)[0].size == (64,)


@pytest.mark.parametrize(
    ("argv", "defaults", "words"),
    [
        (["--metod", "mae"], {}, ["--metod", "did you mean --method?"]),
        (["--method", "mae", "--mask-ration", "0.5"], {}, ["--mask-ration", "did you mean --mask-ratio?"]),
        (["--versoin"], {}, ["--versoin", "did you mean --version?"]),
        (["--xyz"], {}, ["known: --", "--flip, --help, --"]),
        (["--method", "mae", "--mask-ration=0.5"], {}, ["--mask-ration", "did you mean --mask-ratio?"]),
        (["--method", "mae", "--lr", "fast"], {}, ["--lr", "'fast' is not a number"]),
        (["--method", "mae", "--precision", "fp23"], {}, ["did you mean fp32?"]),
        (["--method", "mae", "--betas", "1"], {}, ["--betas"]),
        (["--method"], {}, ["--method"]),
        ([], {}, ["--method is needed"]),
        (["mae"], {}, ["unexpected 'mae'"]),
        ([], {"method": "mae", "maskratio": 0.5}, ["'maskratio'", "did you mean mask_ratio?"]),
        ([], {"method": "mae", "lr": "1e-3"}, ["lr", "'1e-3' is not a number or none"]),
        ([], {"method": "mae", "betas": 3}, ["betas", "3 is not a list"]),
        ([], {"method": "mae", "size": "big"}, ["size", "'big' is not a whole number"]),
        ([], {"method": "mae", "flip": 1}, ["flip", "1 is not true or false"]),
        ([], {"method": "mae", "precision": "fp23"}, ["did you mean fp32?"]),
    ],
)
def test_mistakes_get_one_line_with_the_remedy(argv: list[str], defaults: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read(*argv, **defaults)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_help_lists_every_flag_with_its_text_and_default(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        read("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for part in [
        "--method",
        "What to train with.",
        "--mask-ratio",
        "0.75",
        "--no-flip",
        "50% of something",
        "0.9 0.95",
    ]:
        assert part in text


def test_two_dataclasses_may_not_share_a_field() -> None:
    with pytest.raises(TypeError, match="same name"):
        parse([Knobs, Knobs], [], {}, prog="p", description="d")


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """A field that was called otherwise."""

    gradient_checkpointing: bool = field(default=False, metadata={"stored_as": "recompute"})
    """Less memory."""


@pytest.mark.parametrize("argv", [["--gradient-checkpointing"], ["--recompute"]])
def test_the_older_name_of_a_flag_is_an_alias_and_its_key_in_files(argv: list[str]) -> None:
    (renamed,) = parse([Renamed], argv, {}, prog="p", description="d")
    assert renamed.gradient_checkpointing
    assert plain(renamed) == {"recompute": True}
    for key in ("recompute", "gradient_checkpointing"):
        assert parse([Renamed], [], {key: True}, prog="p", description="d") == [renamed]
        assert parse([Renamed], ["--no-recompute"], {key: True}, prog="p", description="d") == [Renamed()]
