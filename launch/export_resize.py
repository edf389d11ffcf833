"""`ssl-export resize RUN --image-size N --out DIR`: an export for images of another size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain import flags
from ssl_pretrain.errors import UserError

PROG = "ssl-export resize"
ABOUT = """Write the encoder of a run (or an export) as an export for images of another size, which every evaluator then
uses: position tables are resized, and a Swin Transformer can be given other windows."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The new export."""

    out: Path
    """Folder for the export; it must not contain one yet."""
    image_size: tuple[int, ...]
    """Size of the images in pixels: one side, or height and width."""
    window: int | None = None
    """Side of a window of attention in positions, for a Swin Transformer (default: as it is)."""
    code: str | None = None
    """Code that the encoder is made by, module:PACKAGE:FUNCTION. It must be the name in its config.json: nothing is
    imported because a file names it."""


def resize(argv: Sequence[str]) -> int:
    """Run the command with the words after `resize`; returns the exit code. Raises UserError for wrong words and flags."""
    source = argv[0] if argv and not argv[0].startswith("-") else None
    rest = argv[1:] if source else argv
    (options,) = flags.parse([Options], rest, {}, prog=f"{PROG} RUN", description=ABOUT)
    if source is None:
        raise UserError(f"name the run first: {PROG} RUN --image-size N --out DIR")
    if len(options.image_size) > 2 or min(options.image_size) < 1:
        words = " ".join(map(str, options.image_size))
        raise UserError(f"--image-size {words}: one side, or height and width, in pixels")
    if (options.out / "config.json").exists():
        raise UserError(f"--out {options.out} already contains an export: choose another folder")

    from ssl_pretrain import encoder  # imports torch, so only after the flags are checked

    read = encoder.load(source, code=options.code)
    size = options.image_size[0], options.image_size[-1]
    made = encoder.resized(read, size, window=options.window)
    encoder.save(options.out, made)
    windows = getattr(made.backbone.config, "window", None)
    more = "" if windows is None else f", windows of {windows} x {windows} positions"
    print(f"{made.name} for images of {size[0]} x {size[1]} pixels{more}")
    print(f"written: {options.out}")
    return 0
