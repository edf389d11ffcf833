"""What of the data is not taken as images, and why: counts by reason, with a few names. Every source has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

EXAMPLES = 10  # names kept of each reason
SHOWN = 3  # names told of each reason in a sentence
REASONS = 8  # reasons told in a sentence

# Reasons that several sources have, shown after a number: "2 x hidden (.git, .a.png)".
HIDDEN = "hidden"
COMPRESSED = "compressed archive, unpack it to a plain .tar to use it"
BROKEN_LINK = "link that leads nowhere"
NO_FILE = "neither file nor folder"
UNREADABLE = "that may not be read"
OTHER_DATA = "archive or table beside the images"
LOOSE = "loose image beside the shards"
NO_SPLIT = "image outside of the splits"
TRUNCATED = "truncated shard, what is whole in it is used: copy or download it again"
DAMAGED = "damaged shard, what comes before the damage is used: copy or download it again"
BEHIND_END = "shard with more behind its end, which is not read: unpack and pack it again"
TWICE = "member of a name that comes again, the last one is used"
MAP = "map of another image"
SIDECAR = "sidecar"
# Reasons of the second kind: the image is used.
NO_LABEL = "without a label"
BAD_LABEL = "with a label that cannot be read, used without one"
STRAY = "beside the class folders, used without a label"


@final
@dataclass
class LeftOut:
    """Counts by reason. `out`: what is not used. `noted`: images that are used, but not as the others are."""

    out: dict[str, tuple[int, list[str]]] = field(default_factory=dict)  # reason: how many, the first names
    noted: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count something that is not used."""
        _add(self.out, reason, [name], count)

    def note(self, reason: str, name: str, count: int = 1) -> None:
        """Count images that are used, but not as the others are."""
        _add(self.noted, reason, [name] if name else [], count)

    def discard(self, reason: str, name: str) -> None:
        """Take back one count of something that is used after all."""
        count, names = self.out.get(reason, (0, []))
        if name in names and count > 1:
            self.out[reason] = (count - 1, [other for other in names if other != name])
        elif name in names:
            del self.out[reason]

    def merge(self, other: LeftOut) -> None:
        """Count what another one has counted."""
        for mine, theirs in ((self.out, other.out), (self.noted, other.noted)):
            for reason, (count, names) in theirs.items():
                _add(mine, reason, names, count)

    def __bool__(self) -> bool:
        return bool(self.out or self.noted)

    @property
    def total(self) -> int:
        """How many files, members and rows are not used."""
        return sum(count for count, _ in self.out.values())

    def sentence(self) -> str:
        """One line: counts by reason, the largest first, with some names. "" where there is nothing to tell."""
        parts = []
        if self.out:
            parts.append("left out of the data: " + _listed(self.out))
        if self.noted:
            parts.append("images to note: " + _listed(self.noted))
        return "; ".join(parts)

    def lines(self) -> list[str]:
        """A line for each reason, with up to EXAMPLES names."""
        return [
            f"{count:,} x {reason}: {', '.join(names)}{', ...' if count > len(names) else ''}"
            for part in (self.out, self.noted)
            for reason, (count, names) in _ordered(part)
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain data, for an index or a report."""
        return {"out": self.out, "noted": self.noted}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> LeftOut:
        """What `as_json` gave."""
        parts = (stored.get(key, {}) for key in ("out", "noted"))
        return cls(*({str(r): (int(n), [str(name) for name in names]) for r, (n, names) in p.items()} for p in parts))


def _add(counts: dict[str, tuple[int, list[str]]], reason: str, names: list[str], count: int) -> None:
    before, known = counts.get(reason, (0, []))
    counts[reason] = (before + count, (known + names)[:EXAMPLES])


def _ordered(counts: dict[str, tuple[int, list[str]]]) -> list[tuple[str, tuple[int, list[str]]]]:
    return sorted(counts.items(), key=lambda item: (-item[1][0], item[0]))


def _listed(counts: dict[str, tuple[int, list[str]]]) -> str:
    ordered = _ordered(counts)
    parts = []
    for reason, (count, names) in ordered[:REASONS]:
        shown = ", ".join(names[:SHOWN]) + (", ..." if count > SHOWN else "")
        parts.append(f"{count:,} x {reason}" + (f" ({shown})" if names else ""))
    if len(ordered) > REASONS:
        parts.append(f"{sum(count for _, (count, _) in ordered[REASONS:]):,} for other reasons")
    return ", ".join(parts)
