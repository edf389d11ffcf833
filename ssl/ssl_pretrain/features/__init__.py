"""Features of frozen encoders: extraction, their cache, nearest neighbours and k-means."""

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

__all__ = [
    "Bad",
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
