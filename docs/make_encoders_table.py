"""Write the table of docs/backbones.md: which method trains which family of encoders, and why not.

    python docs/make_encoders_table.py            write it
    python docs/make_encoders_table.py --check    exit code 1 where it is out of date

Each cell is one step (loss and gradients) of the method on a small encoder of the family, on images of 64 x 64 pixels. If
the method refuses the encoder, its reason becomes a footnote.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ssl_pretrain import plugins
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError

PAGE = Path(__file__).parent / "backbones.md"
BEGIN = "<!-- Made by docs/make_encoders_table.py. Do not edit. -->"
END = "<!-- End of the table. -->"
SIZE = (64, 64)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_micro", {"patch_size": 8, "depth": 2, "dim": 64, "heads": 2}),
    "octic ViT": ("octic_micro", {"patch_size": 8, "depth": 2, "dim": 64, "heads": 2}),
    "Jumbo": ("jumbo_micro", {"patch_size": 8, "depth": 2, "dim": 64, "heads": 2}),
    "grouper": ("grouper_micro", {"patch_size": 8, "depth": 2, "dim": 64, "heads": 2, "groups": 8}),
    "Swin": ("swin_micro", {"depths": (1, 2, 1)}),
    "Hiera": ("hiera_micro", {"depths": (1, 1, 1)}),
    "ResNet": ("resnet18", {"depths": (1, 1, 1, 1)}),
    "ConvNeXt": ("convnext_micro", {"depths": (1, 1, 1, 1)}),
}


def outcome(method: str, family: str) -> str | None:
    """None if a step gives a finite loss and a gradient of the encoder, else why the method refuses."""
    name, options = FAMILIES[family]
    try:
        built = one_step.build_on(method, name, SIZE, options, None, {})
        losses = built(one_step.batch(built), one_step.step())
    except UserError as reason:
        return str(reason)
    losses.total.backward()
    gradients = [p.grad for p in built.encoder.parameters() if p.grad is not None]
    if not bool(losses.total.isfinite()) or not any(bool(g.abs().sum() > 0) for g in gradients):
        raise RuntimeError(f"{method} on {name}: the loss is not finite, or no gradient reaches the encoder")
    return None


def short(method: str, reason: str) -> str:
    """A reason as a footnote for every method and family: its first clause, without names of methods and classes."""
    first = re.split(r", and [A-Z]\w+ does not|, of \d+ x \d+ pixels here|; |: give ", reason)[0]
    return re.sub(rf"^{method}( --\S+)? ", "", first)


def table(methods: Sequence[str]) -> str:
    """The table and its footnotes."""
    notes: dict[str, int] = {}
    rows = []
    for method in methods:
        cells = []
        for family in FAMILIES:
            reason = outcome(method, family)
            if reason is None:
                cells.append("yes")
            else:
                cells.append(f"no ({notes.setdefault(short(method, reason), len(notes) + 1)})")
        rows.append(f"| [{method}](methods/{method}.md) | {' | '.join(cells)} |")
    head = [f"| method | {' | '.join(FAMILIES)} |", f"| --- |{' --- |' * len(FAMILIES)}"]
    return "\n".join([BEGIN, "", *head, *rows, "", *(f"{n}. {text}" for text, n in notes.items()), "", END])


def main() -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    options = parser.parse_args()
    torch.set_num_threads(1)
    page = PAGE.read_text()
    made = re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table(sorted(plugins.own("ssl_pretrain.methods"))),
                  page, flags=re.DOTALL)  # fmt: skip
    if not options.check:
        PAGE.write_text(made)
    elif made != page:
        print(f"{PAGE} is out of date: python docs/make_encoders_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
