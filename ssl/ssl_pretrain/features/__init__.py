"""Features of frozen encoders: extraction, their cache, nearest neighbours, k-means, a step for scikit-learn."""

from .extraction import (
    Extracted,
    NotFinite,
    Pixels,
    Precision,
    Progress,
    Tap,
    blocks,
    crops_of,
    extract,
    pixel_encoder,
    poolings,
    vectors,
)
from .feature_cache import Bad
from .transformer import EncoderTransformer

__all__ = [
    "Bad",
    "EncoderTransformer",
    "Extracted",
    "NotFinite",
    "Pixels",
    "Precision",
    "Progress",
    "Tap",
    "blocks",
    "crops_of",
    "extract",
    "pixel_encoder",
    "poolings",
    "vectors",
]
