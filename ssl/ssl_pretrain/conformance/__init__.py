"""Checks of a plugin against its contract, by its name."""


class Fault(AssertionError):
    """What a plugin does wrong; the message names it."""
