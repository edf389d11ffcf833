"""A quick kNN score of an encoder, for the end of a run and the curve during it; `ssl-eval knn` gives the full protocol."""

from typing import Any, final

import numpy as np
import torch

from ..config import Run
from ..data.decode import allow_pixels
from ..data.names import canonical_split
from ..data.source import Source, evaluation_splits, open_source, splits
from ..data.subset import Subset
from ..data.training import ALL, open_training
from ..encoder import Encoder
from ..errors import UserError
from ..features import extract
from ..features.neighbours import nearest, vote
from ..randomness import numpy_generator

BANK, QUERIES = 10_000, 2_000  # at most so many images, drawn by the seed: seconds on a CPU
NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's kNN protocol


@final
class KnnScore:
    """Top-1 in percent of `QUERIES` labelled images by their 20 nearest among `BANK` others; call it with an Encoder."""

    def __init__(self, bank: Source, queries: Source, *, batch_size: int, workers: int) -> None:
        self.bank, self.queries = bank, queries
        self.how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "cache": False}

    @classmethod
    def of(cls, run: Run) -> "KnnScore | None":
        """The score on a run's data: the images it trains on against those of the test split where there is one, else
        two parts of the images it trains on; of labelled images only. None where the images have no labels.

        Raises UserError where they have none and the run is to be scored on the way (--knn-every).
        """
        score = cls._of(run)
        if score is None and run.knn_every:
            raise UserError(
                f"--knn-every {run.knn_every} scores by labels, and {run.data} has none, one class only, or too few "
                f"images: leave the flag out, or sort the images into a folder a class"
            )
        return score

    @classmethod
    def _of(cls, run: Run) -> "KnnScore | None":
        allow_pixels(run.max_pixels)
        bank = _labelled(open_training(run.data, run.train_split))
        if bank is None or len(bank) < 5:
            return None
        order = numpy_generator(run.seed, "score").permutation(len(bank))
        if (test := _test_split(run)) is not None:
            queries = _labelled(open_source(run.data, test))
            if queries is None:
                return None
            queries = Subset(queries, numpy_generator(run.seed, "score").permutation(len(queries))[:QUERIES])
        else:
            query_count = min(QUERIES, len(bank) // 5)
            queries, order = Subset(bank, order[:query_count]), order[query_count:]
        return cls(Subset(bank, order[:BANK]), queries, batch_size=256, workers=run.workers or 0)

    def __call__(self, encoder: Encoder) -> float:
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        sides = [extract(encoder, side, ("pooled",), device=device, **self.how) for side in (self.bank, self.queries)]
        (bank, bank_labels), (queries, labels) = [(side.features["pooled"], side.labels) for side in sides]
        similarity, index = nearest(torch.as_tensor(np.asarray(queries)), torch.as_tensor(np.asarray(bank)), NEIGHBOURS)
        assert bank_labels is not None  # `of` takes only labelled images
        assert labels is not None
        classes = int(max(bank_labels.max(), labels.max())) + 1
        votes = vote(similarity, index, torch.as_tensor(bank_labels), classes, TEMPERATURE, NEIGHBOURS)
        return 100 * float((votes.argmax(1).cpu() == torch.as_tensor(labels)).float().mean())


def _test_split(run: Run) -> str | None:
    """The split for testing; None where there is none, or the run trains on it."""
    known = splits(run.data)
    chosen = canonical_split(run.train_split or "train")
    if run.train_split == ALL or chosen not in known:
        return None
    try:
        test = evaluation_splits(run.data)[1]
    except UserError:
        return None
    return None if test == chosen else test


def _labelled(source: Source) -> Source | None:
    """The samples that have a label; None where none has."""
    if source.labels is None or not (source.labels >= 0).any():
        return None
    known = np.flatnonzero(source.labels >= 0)
    return source if len(known) == len(source) else Subset(source, known)
