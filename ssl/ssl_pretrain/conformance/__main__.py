"""`python -m ssl_pretrain.conformance NAME [NAME ...]`: one line a check. Exit codes: 0 all hold, 1 a fault, 2 a mistake
in the command."""

import argparse
import sys
from collections.abc import Sequence

from ..errors import UserError
from . import KINDS, Result, resolve, run

PROG = "python -m ssl_pretrain.conformance"


def main(argv: Sequence[str] | None = None) -> int:
    """Check the plugins that `argv` names, and print what was found; returns the exit code."""
    parser = argparse.ArgumentParser(prog=PROG, description="Check that plugins keep the contract of their kind.")
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help=f"a plugin, or KIND:NAME where KIND is one of {', '.join(KINDS)}"
    )
    try:
        wanted = [resolve(word) for word in parser.parse_args(argv).names]
    except UserError as mistake:
        print(f"{PROG}: {mistake}", file=sys.stderr)
        return 2
    faults = 0
    for kind, name in wanted:

        def tell(result: Result, label: str = f"{kind}:{name}") -> None:
            text = f"ok     {label} {result.check}" if result.fault is None else ""
            text = text or f"FAULT  {label} {result.check}: {result.fault}"
            print(f"{text} ({result.seconds:.1f} s)", flush=True)

        faults += sum(result.fault is not None for result in run(kind, name, tell))
    print(f"{faults} fault{'s' if faults != 1 else ''}" if faults else "no faults", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
