"""The command `ssl-eval`."""

import ast
import contextlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ssl_pretrain import flags, plugins
from ssl_pretrain.data.source import splits
from ssl_pretrain.distributed import environment
from ssl_pretrain.errors import UserError, nearest
from ssl_pretrain.foreign.specs import Spec

from .options import Launch
from .run_command import run_command
from .start import start_processes_or_job

PROG = "ssl-eval"
EVALUATORS = "ssl_pretrain.eval"
SUITE = "suite"  # many evaluations in one command
WORDS = ("random", "pixels")  # what --encoder may be beside a path
EPILOG = (
    "Example: ssl-eval knn --encoder runs/mae --data photos/. The result is printed and written to results.json. "
    "Features are kept under $SSL_PRETRAIN_CACHE (or ~/.cache/ssl-pretrain) and shared by all evaluators. Exit codes: "
    "0 done, 2 wrong flags or data, 1 any other error."
)


def main(argv: Sequence[str] | None = None, *, placed: bool = False) -> int:
    """Run the command and print its messages; returns its exit code.

    placed: this process was started by the launcher, so the flags of the launcher are ignored.
    """

    def work(argv: list[str]) -> int:
        try:
            return _main(argv, placed)
        except (UserError, OSError):
            if _helping():
                return 0  # the first process meets it too, and says it
            raise

    return run_command(PROG, work, argv, nothing="; no result was written")


def _main(argv: list[str], placed: bool) -> int:
    known = sorted([*plugins.names(EVALUATORS), SUITE])
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(known), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name = argv[0]
    if name.startswith("-"):
        raise UserError(f"the evaluator comes first: {PROG} knn {' '.join(argv)}")
    if name not in known:
        raise UserError(f"unknown evaluator {name!r}{nearest(name, known)}")
    if name == SUITE:
        return _suite(argv, placed)
    _check_paths(argv[1:])
    request = _read(argv)
    if not placed:
        job = "eval/grid" if request.launch.grid else re.sub(r"[^\w./-]+", "-", f"{request.options.encoder}-{name}")
        code = start_processes_or_job("evaluate", argv, request.launch, request.options.out or Path(job), _read)
        if code is not None:
            return code
    result, path = _evaluate(request)
    if _helping():
        return 0
    importlib.import_module(f"{EVALUATORS}._results").show(result)
    print(f"written: {path}")
    return 0


@dataclass(frozen=True)
class _Request:
    """A command that was read."""

    name: str
    evaluator: ModuleType
    options: Any
    launch: Launch
    config: Any


def _read(argv: list[str]) -> _Request:
    """Read the words of a command. Raises UserError."""
    name = argv[0]
    _check_continuing(argv)
    evaluator = plugins.load(EVALUATORS, name, "evaluator")  # imports torch: not before the command looks good
    options = importlib.import_module(f"{EVALUATORS}._evaluation").Options
    published = getattr(evaluator, "PROTOCOLS", {})
    protocol = flags.word(argv, "--protocol")
    if protocol is not None and protocol not in published:
        hint = nearest(protocol, published) if published else "; it has none"
        raise UserError(f"{name} has no protocol {protocol!r}{hint}")
    what, launch, config = flags.parse(
        [options, Launch, evaluator.Config],
        argv[1:],
        published.get(protocol, {}),
        prog=f"{PROG} {name}",
        description=(evaluator.__doc__ or name).split("\n\n")[0],
        epilog=EPILOG,
    )
    return _Request(name, evaluator, what, _uninterrupted(launch), config)


def _evaluate(request: _Request) -> tuple[dict[str, Any], Path]:
    """What results.json holds, and its path."""
    evaluation = importlib.import_module(f"{EVALUATORS}._evaluation")
    with _progress() as progress:
        found: tuple[dict[str, Any], Path] = evaluation.run(
            request.name, request.evaluator, request.options, request.config, progress
        )
    return found


def _suite(argv: list[str], placed: bool) -> int:
    from . import suite as suites

    def read(argv: list[str]) -> list[Any]:
        description = (suites.__doc__ or "").split("\n\n")[0]
        _check_continuing(argv)
        return flags.parse([suites.Suite, Launch], argv[1:], {}, prog=f"{PROG} {SUITE}", description=description)

    suite, launch = read(argv)
    entries = suites.read(suite.list)
    if not placed:
        code = start_processes_or_job("evaluate", argv, _uninterrupted(launch), suite.out, read)
        if code is not None:
            return code

    if _helping():
        for entry in entries:
            with contextlib.suppress(Exception):  # the first process meets it too, and says it
                _evaluate(_read([*entry.argv, "--out", str(entry.folder(suite.out))]))
        return 0

    def check(argv: list[str]) -> None:
        known = plugins.names(EVALUATORS)
        if argv[0] not in known:
            raise UserError(f"unknown evaluator {argv[0]!r}{nearest(argv[0], known)}")
        _check_paths(argv[1:])
        _read(argv)

    return suites.run(entries, suite, check, lambda argv: _evaluate(_read(argv)))


def _check_continuing(argv: list[str]) -> None:
    """Raise UserError for flags that say how a job saves and continues."""
    for flag in ("--stop-before", "--max-requeues"):
        if flags.word(argv, flag) is not None:
            raise UserError(
                f"{flag} goes with ssl-pretrain: an evaluation cannot save and continue; give it enough --time"
            )


def _uninterrupted(launch: Launch) -> Launch:
    """The same launch without a signal before the time limit, at which an evaluation could only die."""
    return replace(launch, stop_before=0)


def _helping() -> bool:
    """Whether this process only helps the first one of its command."""
    return environment.find().rank > 0


def _overview(known: list[str]) -> str:
    lines = [
        f"usage: {PROG} EVALUATOR --encoder ENCODER [--data DATA] [flags]",
        "",
        "Evaluate an encoder on images. Evaluators:",
        "",
        *(f"  {name:<12} {_summary(name)}" for name in known),
        "",
        f"{PROG} EVALUATOR --help shows all flags. {EPILOG}",
    ]
    return "\n".join(lines)


def _summary(name: str) -> str:
    """The first sentence of an evaluator's file, without importing it."""
    spec = importlib.util.find_spec(f"{__package__}.{name}" if name == SUITE else f"{EVALUATORS}.{name}")
    if spec is None or spec.origin is None:
        return ""
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.replace("\n", " ").split(" (")[0].split(". ")[0].split(": ")[0]


def _check_paths(argv: list[str]) -> None:
    """Raise UserError for an encoder or data that is not there, as far as it can be seen without torch."""
    encoder, like, data = (flags.word(argv, flag) for flag in ("--encoder", "--like", "--data"))
    for flag, path in (("--encoder", encoder), ("--like", like)):
        if path is None or (flag == "--encoder" and path in WORDS) or Spec.parse(path) or Path(path).exists():
            continue
        there = (
            [str(Path(path).parent / entry.name) for entry in Path(path).parent.iterdir()]
            if Path(path).parent.is_dir()
            else []
        )
        hint = nearest(path, [*there, *WORDS])
        raise UserError(
            f"{flag} {path} does not exist"
            + (hint if hint.startswith("; did") else f"; give a run, an encoder folder, {' or '.join(WORDS)}")
        )
    if like is not None and encoder != "random":
        raise UserError("--like gives the shape of an untrained encoder: it goes with --encoder random only")
    if encoder == "pixels" and data is None:
        raise UserError("--encoder pixels needs --data")
    if encoder == "random" and like is None and data is None:
        raise UserError("--encoder random needs --data, or --like RUN")
    if data is not None:
        splits(data)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], Callable[[str, int, int], None] | None]]:
    """Yields a function: from the description of a group of bars to a function that updates them, or to None without a
    terminal."""
    if not sys.stderr.isatty():
        yield lambda about: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def about(group: str) -> Callable[[str, int, int], None]:
            def report(what: str, done: int, total: int) -> None:
                text = f"{group}: {what}" if group else what
                if text not in tasks:
                    tasks[text] = bars.add_task(text, total=total)
                bars.update(tasks[text], completed=done, total=total)

            return report

        yield about


if __name__ == "__main__":
    sys.exit(main())
