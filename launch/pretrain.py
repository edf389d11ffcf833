"""The command `ssl-pretrain`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_pretrain import config, flags, plugins
from ssl_pretrain.config import SMALL, Run
from ssl_pretrain.errors import UserError, nearest

PROG = "ssl-pretrain"
DESCRIPTION = "Pretrain a vision encoder on images without labels."
EPILOG = (
    "Example: ssl-pretrain --method mae --data photos/ --out runs/mae. With --method, --help shows the method's and the "
    "encoder's flags too. Exit codes: 0 done, 2 a mistake in the command, 75 stopped early and resumable, 1 anything else."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, having said everything there is to say."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(argv)
    except UserError as mistake:
        print(f"{PROG}: {str(mistake).removeprefix(f'{PROG}: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 75


def _main(argv: list[str]) -> int:
    run, knobs, options = read_command(argv)
    if run.nproc > 1 and not _placed():
        from .processes import run_local

        return run_local("ssl_pretrain.launch.pretrain", argv, run.nproc)

    from ssl_pretrain.train import Diverged, train  # torch: not before the command is known to be good

    try:
        outcome = train(run, knobs, options)
    except Diverged as problem:
        print(f"{PROG}: {problem}", file=sys.stderr)
        return 1
    except OSError as problem:
        where = f" ({problem.filename})" if problem.filename else ""
        print(
            f"{PROG}: cannot write the run: {problem.strerror or problem}{where}; what was written before is whole. "
            f"Free some space or rights there, then the same command continues from the last checkpoint",
            file=sys.stderr,
        )
        return 75
    if outcome.stopped:
        _tell(f"stopped by {outcome.stopped} after step {outcome.step} of {outcome.steps}; saved in {outcome.out}")
        _tell("the same command continues from there")
        return 75
    if outcome.bad_images:
        _tell(f"{outcome.bad_images} unreadable images, listed in {outcome.out / 'bad_images.jsonl'}")
    _finish(run, outcome.out)
    return 0


def read_command(argv: list[str]) -> tuple[Run, Any, Any]:
    """The run, the method's knobs and the encoder's options that a command line (and its --config) asks for.

    Imports torch only once the method, the encoder and the data are known to be there.
    """
    method, encoder, file, data = (flags.word(argv, name) for name in ("--method", "--encoder", "--config", "--data"))
    written = config.read_yaml(Path(file)) if file else {}
    method, data = method or written.get("method"), data or written.get("data", "fractals")
    if method is None:
        # Without a method its knobs are unknown: this prints the run's flags (--help) or names what is wrong with them.
        flags.parse([Run], argv, {}, prog=PROG, description=DESCRIPTION, epilog=_methods() + EPILOG)
        raise AssertionError("a run without a method was accepted")
    if method not in plugins.names("ssl_pretrain.methods"):
        raise UserError(f"unknown method {method!r}{nearest(method, plugins.names('ssl_pretrain.methods'))}")
    if data.split(":")[0] != "fractals" and not Path(data).exists():
        there = [path.name for path in Path(data).parent.iterdir()] if Path(data).parent.is_dir() else []
        hint = nearest(Path(data).name, there) if there else ""
        if hint.startswith("; known"):  # a folder's whole listing is no help
            hint = f"; no name like it in {Path(data).parent.resolve()}"
        raise UserError(f"--data {data} does not exist{hint}")

    from ssl_pretrain import backbones, pretext

    kind = pretext.load(method)
    small = {**SMALL, **kind.recipe.small} if data.split(":")[0] == "fractals" else {}
    name = encoder or written.get("encoder") or small.get("encoder", "vit_small")
    kinds: list[Any] = [Run, kind.Config, backbones.config_class(name)]
    below = {**backbones.defaults(name), **kind.recipe.encoder, **small}
    known = {field for each in kinds for field in each.__dataclass_fields__}
    defaults = {**{key: value for key, value in below.items() if key in known}, **written}
    return tuple(flags.parse(kinds, argv, defaults, prog=PROG, description=DESCRIPTION, epilog=EPILOG))


def _methods() -> str:
    return f"Methods: {', '.join(plugins.names('ssl_pretrain.methods'))}. "


def _placed() -> bool:
    """Whether this is already one of several processes."""
    return "RANK" in os.environ


def _finish(run: Run, out: Path) -> None:
    """Say where the encoder is, how good it is at a glance, and what to do next."""
    if os.environ.get("RANK", "0") != "0":
        return
    from ssl_pretrain import encoder
    from ssl_pretrain.score import NEIGHBOURS, KnnScore

    _tell(f"encoder: {out / 'encoder'}")
    score = KnnScore.of(run) if run.score else None
    if score is not None:
        trained = encoder.load(out)
        untrained = encoder.random_like(trained, seed=run.seed)
        _tell(
            f"kNN top-1 ({NEIGHBOURS} neighbours, {len(score.queries):,} images against {len(score.bank):,}): "
            f"{score(trained):.1f} %, untrained encoder {score(untrained):.1f} %"
        )
    data = "" if run.data == "fractals" else f" --data {run.data}"
    _tell("next:")
    if score is not None:
        _tell(f"  ssl-eval linear --encoder {out}{data}")
        _tell(f"  ssl-eval knn --encoder {out}{data}")
    _tell(f"  tensorboard --logdir {out / 'tensorboard'}")


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
