"""`ssl-pretrain reproduce NAME`: run a recipe, evaluate its encoder, and compare with the result that it records."""

import json
from collections.abc import Callable
from pathlib import Path

from ssl_pretrain import flags, plugins
from ssl_pretrain.config import read_yaml
from ssl_pretrain.data.source import missing
from ssl_pretrain.errors import UserError

from . import recipe_files
from .recipe_files import Recorded

PROG = "ssl-pretrain reproduce"
USAGE = f"""usage: {PROG} NAME --data DIR [--out DIR] [flags of ssl-pretrain]

Run a recipe, evaluate its encoder, and compare with the result that the recipe records. The same command resumes.
Exit codes: 0 reproduced, 1 not reproduced, else those of ssl-pretrain.

"""


def reproduce(argv: list[str], train: Callable[[list[str]], int]) -> int:
    """Run the command with these words after `reproduce`; returns its exit code. train: the command `ssl-pretrain`. Raises
    UserError."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + recipe_files.overview())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name.startswith("-"):
        raise UserError(f"{PROG}: name the recipe first: {PROG} mae_cifar10 --data DIR")
    file = recipe_files.path(name, PROG)
    data = flags.word(rest, "--data") or read_yaml(file).get("data")
    record = recipe_files.recorded(file)
    if record is None:
        raise UserError(
            f"{PROG}: the recipe {name} records no result; 'ssl-pretrain --config list' shows those that do"
        )
    if record.evaluator not in plugins.names("ssl_pretrain.eval"):
        raise UserError(f"{PROG}: the recipe {name} names the evaluator {record.evaluator!r}, which is not installed")
    if data is None:
        raise UserError(f"{PROG} {name}: the recipe needs its images: --data DIR")
    if (nothing := missing(data)) is not None:
        raise UserError(f"--data: {nothing}")
    if "--grid" in rest or flags.word(rest, "--launcher") == "slurm":
        raise UserError(f"{PROG} runs one recipe on this machine: without --grid and --launcher slurm")
    out = Path(flags.word(rest, "--out") or f"runs/reproduce-{file.stem}")

    from . import evaluate

    words = ["--config", str(file), *record.flags, "--no-score", *_without(rest, "--data", "--out")]
    trained_on = data if record.images is None else str(_first_images(Path(data), record.images, out))
    code = train([*words, "--data", trained_on, "--out", str(out)])
    if code != 0:
        return code
    result = out / f"eval-{record.evaluator}"
    code = evaluate.main(
        [record.evaluator, "--encoder", str(out), "--data", data, "--out", str(result), "--no-baselines"]
    )
    if code != 0:
        return code
    measured = json.loads((result / "results.json").read_text())["metrics"][record.metric]
    changed = _without(rest, "--data", "--out")
    print(_comparison(name, record, measured, changed))
    return 0 if abs(measured - record.value) <= record.tolerance else 1


def _comparison(name: str, record: Recorded, measured: float, changed: list[str]) -> str:
    """What is said at the end: the two numbers and whether they agree."""
    difference = measured - record.value
    agrees = abs(difference) <= record.tolerance
    took = "" if record.minutes is None else f"; training took {record.minutes:g} minutes"
    rows = [
        ("recipe", f"{name}, {record.evaluator} {record.metric}"),
        ("recorded", f"{record.value:.2f} ({record.where}{took})"),
        ("measured", f"{measured:.2f}" + (f" (with {' '.join(changed)})" if changed else "")),
        ("difference", f"{difference:+.2f}"),
        ("tolerance", f"{record.tolerance:.2f}"),
        ("result", "reproduced" if agrees else "not reproduced"),
    ]
    return "\n".join(f"{key:<11} {value}" for key, value in rows)


def _first_images(data: Path, count: int, out: Path) -> Path:
    """A folder beside `out` with the first images of the training part of a folder of parquet files, in one file."""
    files = sorted(data.glob("train-*.parquet")) if data.is_dir() else []
    if not files:
        raise UserError(
            f"--data {data}: the recorded run was trained on the first {count:,} training images of a folder with "
            f"train-*.parquet files; give such a folder"
        )
    parquet = plugins.optional("pyarrow.parquet", PROG, "'ssl-pretrain[parquet]'")
    folder = out.with_name(f"{out.name}-images")
    target = folder / "train-00000-of-00001.parquet"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(parquet.read_table(files[0]).slice(0, count), folder / ".part")
        (folder / ".part").rename(target)
    return folder


def _without(argv: list[str], *names: str) -> list[str]:
    """The words without these flags and their values."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in names:
            skip = True
        elif word.split("=")[0] not in names:
            kept.append(word)
    return kept
