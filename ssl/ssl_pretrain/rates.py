"""Learning rate and weight decay of single parameters, as multipliers of the run's: frozen phases, slower parts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .errors import UserError, nearest

SHOWN = 5  # names of parameters that a message lists


@dataclass(frozen=True)
class Rate:
    """Multipliers for the parameters whose name in the method fits a pattern. Those of several rules multiply.

    names: a pattern as of file names, "encoder.patch_embed.*". lr and decay: factors on the run's learning rate and weight
    decay. start: share of the run before which the learning rate is 0; then it rises linearly over `ramp`, a share of the
    run. All are functions of the run's progress, so nothing of it is in a checkpoint. optional: the rule may fit no
    parameter; it is for settings that serve several encoders.
    """

    names: str
    lr: float = 1.0
    decay: float = 1.0
    start: float = 0.0
    ramp: float = 0.0
    optional: bool = False

    def fits(self, name: str) -> bool:
        """Whether the rule is for the parameter of that name."""
        return fnmatchcase(name, self.names)

    def lr_at(self, progress: float) -> float:
        """The factor on the learning rate at this progress in [0, 1)."""
        if progress < self.start:
            return 0.0
        return self.lr * (min(1.0, (progress - self.start) / self.ramp) if self.ramp else 1.0)


def parse(texts: Iterable[str]) -> tuple[Rate, ...]:
    """The rules of `--rates`: each "PATTERN KEY=VALUE ..." with the keys lr, decay, start and ramp, and possibly the word
    "optional". Raises UserError."""
    rules = []
    for text in texts:
        pattern, *words = text.split() or [""]
        values: dict[str, float] = {}
        optional = "optional" in words
        for word in (word for word in words if word != "optional"):
            key, equals, number = word.partition("=")
            if key not in ("lr", "decay", "start", "ramp") or not equals:
                raise UserError(f"--rates {text!r}: {word!r} is none of lr=, decay=, start=, ramp= with a number")
            try:
                values[key] = float(number)
            except ValueError:
                raise UserError(f"--rates {text!r}: {number!r} is not a number") from None
            most = 1.0 if key in ("start", "ramp") else float("inf")
            if not 0 <= values[key] <= most or values[key] == float("inf"):
                raise UserError(f"--rates {text!r}: {key} must be {'in [0, 1]' if most == 1 else 'at least 0'}")
        if not values:
            raise UserError(
                f"--rates {text!r} changes nothing: add lr=, decay=, start= or ramp=, like 'encoder.* lr=0.1'"
            )
        rules.append(Rate(pattern, **values, optional=optional))
    return tuple(rules)


def check(rules: Sequence[Rate], names: Iterable[str]) -> None:
    """Raise UserError, with the nearest name or the first ones, for a rule that fits no trained parameter, unless it is
    optional."""
    known = list(names)
    for rule in rules:
        if rule.optional or any(rule.fits(name) for name in known):
            continue
        hint = nearest(rule.names, known)
        if not hint.startswith("; did"):  # a model may have thousands of names
            hint = f"; the first of {len(known)} are {', '.join(known[:SHOWN])}"
        raise UserError(f"--rates {rule.names!r} fits no trained parameter{hint}")
