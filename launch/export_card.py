"""`ssl-export card RUN`: the model card of an export, written again with scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain import flags
from ssl_pretrain.errors import UserError

PROG = "ssl-export card"
ABOUT = (
    """Write the model card (README.md) of a run's export again, with the scores of the evaluations below the run."""
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The export."""

    code: str | None = None
    """Code that the encoder is made by, module:PACKAGE:FUNCTION. It must be the name in its config.json: nothing is
    imported because a file names it."""


def card(argv: Sequence[str]) -> int:
    """Run the command with the words after `card`; returns the exit code. Raises UserError for wrong words and flags, and
    where the card cannot be written."""
    source = argv[0] if argv and not argv[0].startswith("-") else None
    rest = argv[1:] if source else argv
    (options,) = flags.parse([Options], rest, {}, prog=f"{PROG} RUN", description=ABOUT)
    if source is None:
        raise UserError(f"name the run first: {PROG} RUN")

    from ssl_pretrain import encoder, model_card  # imports torch, so only after the flags are checked

    run = Path(source)
    read = encoder.load(run, code=options.code)
    folder = run if (run / "config.json").is_file() else run / "encoder"
    scores = model_card.scores_below(run, read.fingerprint)
    try:
        encoder.write_card(folder, read, scores)
    except OSError as problem:
        raise UserError(f"{folder} cannot be written ({problem.strerror})") from None
    for score in scores:
        print(f"{score.evaluator} on {score.data}, {score.split}: top-1 {score.top1:.2f} %")
    print(f"written: {folder / 'README.md'}, with {len(scores)} scores")
    return 0
