"""Errors that the user can correct. The commands print the message and exit with 2, without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can correct. The message says what is wrong, where, and what would be right.

    reported_elsewhere: whether another process prints the message, so that this one does not.
    """

    reported_elsewhere = False


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest known word, else '; known: a, b, c' (to append to a message)."""
    known = list(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
