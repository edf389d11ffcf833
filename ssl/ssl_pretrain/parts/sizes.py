"""Sizes of a method's parts: the paper's for the paper's encoders and data, smaller for smaller encoders and less data.

Papers give the sizes of decoders, predictors and heads for a ViT-B or larger, and numbers of prototypes for ImageNet-1k.
Beside an encoder of a million parameters such parts are most of the work. `Method.sizes` uses these functions for the knobs
that are left open; docs/running.md has the rule as a table.
"""

import math

VIT_BASE, VIT_SMALL = 768, 384  # widths of encoders from which on a paper's widths apply
DEPTH = 12  # of both
IMAGENET = 1_281_167  # training images of ImageNet-1k


def width(paper: int, dim: int, *, full: int = VIT_BASE, multiple: int = 128) -> int:
    """The width of a part beside an encoder of width `dim`: in proportion to it, a multiple of `multiple`, and at most the
    paper's, which applies from encoders of width `full` on."""
    if dim >= full:
        return paper
    return min(paper, multiple * max(1, math.floor(paper * dim / (full * multiple) + 0.5)))


def depth(paper: int, blocks: int) -> int:
    """The number of blocks of a part beside an encoder of `blocks` blocks: in proportion, rounded down, at least 1; the
    paper's from 12 blocks on."""
    return paper if blocks >= DEPTH else max(1, paper * blocks // DEPTH)


def heads(paper: int, of: int, dim: int, head_width: int = 32) -> int:
    """The number of attention heads of a part of width `of`: the paper's beside encoders from a ViT-B on, else as many of
    about `head_width` channels as divide the width."""
    if dim >= VIT_BASE:
        return paper
    return max(count for count in range(1, max(1, of // head_width) + 1) if of % count == 0)


def prototypes(paper: int, images: int | None, least: int) -> int:
    """The number of prototypes for so many training images: in proportion to ImageNet-1k's, the nearest power of two,
    between `least` and the paper's. The paper's where the number of images is not known."""
    if images is None:
        return paper
    share = max(1.0, paper * images / IMAGENET)
    return min(paper, max(least, 2 ** round(math.log2(share))))


def at_most_a_share(paper: int, images: int | None, share: float) -> int:
    """The length of a queue, or a number of negatives: the paper's, or the power of two below this share of the training
    images. The paper's where the number of images is not known."""
    if images is None:
        return paper
    return min(paper, 2 ** math.floor(math.log2(max(1.0, images * share))))
