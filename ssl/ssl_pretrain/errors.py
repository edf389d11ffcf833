"""What a user did wrong, said in one message with the remedy; the commands print it and exit with 2, no traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """The user's mistake. The message says what is wrong, where, and what would be right.

    reported_elsewhere: whether another process prints it, so that this one does not.
    """

    reported_elsewhere = False


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest known word, else '; known: a, b, c' (for putting behind a message)."""
    known = list(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
