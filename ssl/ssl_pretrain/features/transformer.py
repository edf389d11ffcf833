"""An encoder as a step of scikit-learn's pipelines. It follows scikit-learn's conventions and does not import it.

Shapes: n pictures, F features.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import torch
from PIL import Image

from .. import encoder as exports
from ..encoder import Encoder
from ..errors import UserError
from .extraction import Tap, vectors

PARAMETERS = ("encoder", "feature", "batch_size", "device")


@final
class EncoderTransformer:
    """Pictures to features: a transformer in the sense of scikit-learn (`Pipeline`, `clone`, `GridSearchCV`, joblib).

    `encoder_` is the Encoder after `fit`, which learns nothing and only loads it.
    """

    def __init__(
        self,
        encoder: str | Path | Encoder = "",
        *,
        feature: str = "pooled",
        batch_size: int = 64,
        device: str | torch.device = "cpu",
    ) -> None:
        """encoder: an Encoder, or the path of an export or a run; feature: a vector's name, as in `ssl-eval --features`:
        pooled, cls, mean, or of an earlier block (mean@-4)."""
        self.encoder, self.feature, self.batch_size, self.device = encoder, feature, batch_size, device

    def fit(self, X: Any = None, y: Any = None) -> Self:
        """Load the encoder. Raises UserError where there is none, and for an unknown feature."""
        Tap.parse(self.feature)
        given = self.encoder if isinstance(self.encoder, Encoder) else exports.load(self.encoder)
        self.encoder_ = given.to(self.device).eval()
        return self

    @torch.inference_mode()
    def transform(self, X: Iterable[Any]) -> np.ndarray:
        """The features (n, F) float32 of n pictures: paths of files, PIL images, arrays (H, W, C) uint8, or the bytes of
        image files. Raises UserError for one that cannot be read."""
        if not hasattr(self, "encoder_"):
            self.fit()
        pictures, tap = list(X), Tap.parse(self.feature)
        rows = []
        for first in range(0, len(pictures), self.batch_size):
            images = self.encoder_.preprocess(_opened(pictures[first : first + self.batch_size]))
            rows.append(vectors(self.encoder_, images, (tap,))[str(tap)].float().cpu().numpy())
        return np.concatenate(rows) if rows else np.empty((0, self.encoder_.backbone.pooled_dim), np.float32)

    def fit_transform(self, X: Iterable[Any], y: Any = None) -> np.ndarray:
        """`fit` and then `transform`."""
        return self.fit().transform(X)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """The name of each column, for data frames: pooled_0, pooled_1, ..."""
        blank = np.zeros((*self.fit().encoder_.preprocessing.crop, self.encoder_.preprocessing.channels), np.uint8)
        return np.array([f"{self.feature}_{i}" for i in range(self.transform([blank]).shape[1])], dtype=object)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def set_params(self, **params: Any) -> Self:
        """Set arguments of the constructor. Raises ValueError for an unknown name."""
        for name, value in params.items():
            if name not in PARAMETERS:
                raise ValueError(f"EncoderTransformer has no parameter {name!r}; it has {', '.join(PARAMETERS)}")
            setattr(self, name, value)
        self.__dict__.pop("encoder_", None)
        return self

    def __repr__(self) -> str:
        given = self.encoder.name if isinstance(self.encoder, Encoder) else str(self.encoder)
        return f"EncoderTransformer({given!r}, feature={self.feature!r})"

    def __sklearn_is_fitted__(self) -> bool:
        """Always: `transform` loads what it needs."""
        return True

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn wants to know; only scikit-learn calls this."""
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        inputs = InputTags(one_d_array=True, two_d_array=False, string=True)
        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(),
            requires_fit=False,
            input_tags=inputs,
        )


def _opened(pictures: Sequence[Any]) -> list[Any]:
    """Paths as the bytes of their files, everything else as it is."""
    opened: list[Image.Image | np.ndarray | bytes] = []
    for picture in pictures:
        if isinstance(picture, str | os.PathLike):
            try:
                opened.append(Path(picture).read_bytes())
            except OSError as problem:
                raise UserError(f"{picture}: {problem.strerror}") from None
        else:
            opened.append(picture)
    return opened
