"""`ssl-export to FORMAT RUN --out F`: an export in the format of another program, checked against the encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain import flags
from ssl_pretrain.errors import UserError, nearest

PROG = "ssl-export to"
# What is written by each format: the end of a file's name, or "" for a folder.
FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "timm": "", "transformers": ""}
ABOUT = """Write the encoder of a run (or an export) for another program: onnx (a file for ONNX Runtime and others),
torch-export (a file for torch.export.load), timm or transformers (a folder). The result is checked: it must give the
encoder's features, and the difference is printed. FORMAT is onnx, torch-export, timm or transformers."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The export."""

    out: Path
    """File (.onnx, .pt2) or folder (timm, transformers) to write; it must not exist yet."""
    code: str | None = None
    """Code that the encoder is made by, module:PACKAGE:FUNCTION. It must be the name in its config.json: nothing is
    imported because a file names it."""
    fixed_size: bool = False
    """Make an ONNX or torch.export file for images of the encoder's own size only. It is smaller and faster."""


def write(argv: Sequence[str]) -> int:
    """Run the command with the words after `to`; returns the exit code. Raises UserError for wrong words and flags."""
    words: list[str] = []
    rest = list(argv)
    while rest and not rest[0].startswith("-") and len(words) < 2:
        words.append(rest.pop(0))
    (options,) = flags.parse([Options], rest, {}, prog=f"{PROG} FORMAT RUN", description=ABOUT)
    if len(words) < 2:
        raise UserError(f"name the format and the run first: {PROG} onnx RUN --out FILE.onnx")
    kind, source = words
    if kind not in FORMATS:
        raise UserError(f"unknown format {kind!r}{nearest(kind, list(FORMATS))}")
    out, end = options.out, FORMATS[kind]
    if not out.name.endswith(end):
        raise UserError(f"--out {out}: the name of this file must end with {end}: --out {out.with_suffix(end)}")
    if out.exists() and not (out.is_dir() and not end and not any(out.iterdir())):
        raise UserError(f"--out {out} exists already: choose another name")
    if options.fixed_size and not end:
        raise UserError(f"--fixed-size is for onnx and torch-export; {kind} has no such choice")

    from ssl_pretrain import encoder  # imports torch, so only after the flags are checked
    from ssl_pretrain.foreign import programs, to_libraries

    read = encoder.load(source, code=options.code)
    size = "x".join(map(str, read.backbone.image_size))
    if end:
        any_size = not options.fixed_size and programs.takes_any_size(read)
        make = programs.to_onnx if kind == "onnx" else programs.to_torch_export
        found = make(read, out, any_size=any_size)
        sizes = "of any size" if any_size else f"of {size} pixels"
        print(f"{read.name} as {kind}: batches of any number of images {sizes}")
        if not any_size and not options.fixed_size:
            print(f"images of another size: not possible, because {programs.needs_one_size(read)}")
    elif kind == "timm":
        found = to_libraries.to_timm(read, out)
        print(f"{read.name} for timm: timm.create_model('local-dir:{out}', pretrained=True)")
    else:
        name, found = to_libraries.to_transformers(read, out)
        print(f"{read.name} for transformers ({name}): transformers.AutoModel.from_pretrained('{out}')")
        if "pooled" not in found:
            print("its pooler_output is the class token; this encoder's pooled vector is the mean of the patches")
    for feature, value in found.items():
        print(f"{feature}: largest difference / largest value {value:.1e}")
    print(f"written: {out}")
    return 0
