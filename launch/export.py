"""The command `ssl-export`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssl_pretrain import flags
from ssl_pretrain.errors import UserError, nearest

from .export_card import ABOUT as ABOUT_CARD
from .export_card import card
from .export_resize import ABOUT as ABOUT_RESIZE
from .export_resize import resize
from .export_to import ABOUT as ABOUT_TO
from .export_to import write
from .run_command import run_command

PROG = "ssl-export"
VERBS = ("import", "to", "resize", "card")
USAGE = f"""usage: {PROG} to FORMAT RUN --out F [flags]
       {PROG} resize RUN --image-size N --out DIR [flags]
       {PROG} card RUN [--code NAME]
       {PROG} import FILE --out DIR [flags]

to: {ABOUT_TO}

resize: {ABOUT_RESIZE}

card: {ABOUT_CARD}

import: Read a published checkpoint (MAE, BEiT, I-JEPA, DINO, iBOT, DINOv2, DINOv3, MoCo v3, AIM, data2vec 2.0, or the
versions of timm and transformers) into this package's ViT, or a Swin Transformer V2 into this package's, and write it as
an export, which all commands of this package accept.

{PROG} to, resize, card or import with --help shows all flags. Exit codes: 0 done, 2 wrong flags, 1 any other
error."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The import."""

    out: Path
    """Folder for the export; it must not contain one yet."""
    layout: (
        Literal["mae", "ijepa", "dino", "ibot", "dinov2", "dinov3", "mocov3", "aim", "data2vec2", "transformers"] | None
    ) = None
    """Format of the checkpoint (default: detected from the parameter names)."""
    heads: int | None = None
    """Number of attention heads (default: that of the published model of this layout and width)."""
    part: str | None = None
    """Encoder to read if the file has several: teacher, student, ... (default: the one that its authors evaluate)."""
    image_size: tuple[int, ...] | None = None
    """Resize the position table for images of this size in pixels: one side, or height and width (default: the training
    size; 224 for DINOv2)."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel of the training images, in [0, 1] (default: ImageNet's)."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel of the training images (default: ImageNet's)."""
    source: str | None = None
    """Where the weights are from: a name on the Hugging Face hub (facebook/dinov2-small) or a URL. It is repeated in the
    model cards of this export and of runs that start from it."""
    license: str | None = None
    """Licence of the weights, as the hub names it (apache-2.0, cc-by-nc-4.0). It is repeated like the source."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; it prints all messages and returns its exit code."""
    return run_command(PROG, _main, argv)


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] not in VERBS:
        raise UserError(
            f"unknown word {argv[0]!r}{nearest(argv[0], VERBS)}: {PROG} to FORMAT RUN --out F, "
            f"{PROG} resize RUN --image-size N --out DIR, {PROG} card RUN, or {PROG} import FILE --out DIR"
        )
    if argv[0] == "to":
        return write(argv[1:])
    if argv[0] == "resize":
        return resize(argv[1:])
    if argv[0] == "card":
        return card(argv[1:])
    file = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else None
    rest = argv[2:] if file else argv[1:]
    (options,) = flags.parse(
        [Options], rest, {}, prog=f"{PROG} import FILE", description=USAGE.split("\n\nimport: ")[1]
    )
    if file is None:
        raise UserError(f"name the checkpoint first: {PROG} import FILE --out DIR")
    if (options.out / "config.json").exists():
        raise UserError(f"--out {options.out} already contains an export: choose another folder")

    from ssl_pretrain import encoder  # imports torch, so only after the flags are checked
    from ssl_pretrain.foreign import libraries

    given = {
        "layout": options.layout,
        "heads": options.heads,
        "part": options.part,
        "image-size": "x".join(map(str, options.image_size or ())) or None,
        "mean": "/".join(map(str, options.mean or ())) or None,
        "std": "/".join(map(str, options.std or ())) or None,
    }
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    read = libraries.load(",".join([f"torch:{file}", *words]))
    stated = {"source": options.source, "license": options.license}
    read.lineage |= {name: value for name, value in stated.items() if value is not None}
    encoder.save(options.out, read)
    left = read.lineage["left_out"]
    print(f"{read.lineage['method']}: {read.name}, {sum(p.numel() for p in read.backbone.parameters()):,} parameters")
    if left:
        print(f"left out ({len(left)}): {', '.join(left[:8])}{', ...' if len(left) > 8 else ''}")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
