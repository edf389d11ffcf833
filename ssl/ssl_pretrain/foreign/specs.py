"""Values of `--encoder` that are not paths: encoders of other libraries or in other layouts. Needs no torch.

    timm:NAME[,checkpoint=FILE]      a model of timm
    hf:FOLDER                        a model that transformers saved
    torch:FILE                       a published checkpoint, read into our ViT, ResNet or ConvNeXt (see `published`)
    module:PACKAGE:FUNCTION          the result of a function of your own code

More options are separated by commas: `image-size=224` (or 192x256), `resize=256`, `mean=0.5/0.5/0.5`, `std=...`,
`interpolation=bicubic`; for `torch` also `layout=`, `heads=` and `part=`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, nearest

PREPARATION = ("image-size", "resize", "mean", "std", "interpolation")
KINDS = {"timm": ("checkpoint",), "hf": (), "torch": ("layout", "heads", "part"), "module": ()}
WORDS = {"imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}}  # mean=imagenet,std=imagenet


@dataclass(frozen=True)
class Spec:
    """An encoder that is not an export of this package."""

    kind: str  # one of KINDS
    name: str  # a model's name, a path, or PACKAGE:FUNCTION
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> "Spec | None":
        """The spec in `text`; None if it does not start with one of KINDS and a colon, and so is a path. Raises
        UserError for unknown options and for files that do not exist."""
        kind, colon, rest = text.partition(":")
        if not colon or kind not in KINDS:
            return None
        name, *given = re.split(r",(?=[a-z-]+=)", rest)
        options = dict(part.split("=", 1) for part in given)
        known = (*KINDS[kind], *PREPARATION)
        for option in options:
            if option not in known:
                raise UserError(f"{text}: unknown option {option!r}{nearest(option, known)}")
        path = {"timm": options.get("checkpoint"), "hf": name, "torch": name}.get(kind)
        if path is not None and not Path(path).exists():
            raise UserError(f"{text}: {path or 'the name after the colon'} does not exist; give a local {_PLACE[kind]}")
        if kind == "module" and not re.fullmatch(r"[\w.]+:[\w.]+", name):
            raise UserError(f"{text}: write module:PACKAGE:FUNCTION, a function that returns a torch module")
        return cls(kind, name, options)

    def __str__(self) -> str:
        return ",".join([f"{self.kind}:{self.name}", *(f"{key}={value}" for key, value in self.options.items())])

    def integers(self, option: str, separator: str = "x") -> tuple[int, ...] | None:
        """The positive integers of an option, None if it is not given. Raises UserError for other values."""
        text = self.options.get(option)
        if text is None:
            return None
        if not all(part.isdecimal() and int(part) for part in text.split(separator)):
            raise UserError(f"{self}: {option}={text} must be whole numbers above 0")
        return tuple(int(part) for part in text.split(separator))

    def image_size(self) -> tuple[int, int] | None:
        """The requested (height, width) in pixels."""
        sides = self.integers("image-size")
        if sides is not None and len(sides) > 2:
            raise UserError(f"{self}: image-size is one side, or HEIGHTxWIDTH")
        return None if sides is None else (sides[0], sides[-1])

    def numbers(self, option: str) -> tuple[float, ...] | None:
        """The numbers of `mean` or `std`, one per channel; None if it is not given."""
        text = self.options.get(option)
        if text is None:
            return None
        if text in WORDS:
            return WORDS[text][option]
        try:
            return tuple(float(part) for part in text.split("/"))
        except ValueError:
            raise UserError(
                f"{self}: {option}={text} must be one number per channel, as in {option}=0.5/0.5/0.5, or 'imagenet'"
            ) from None


_PLACE = {"timm": "file of weights", "hf": "folder that transformers saved", "torch": "checkpoint"}
