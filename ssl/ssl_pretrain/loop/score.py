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
from .guard import DOMAIN, ORIGINAL

BANK, QUERIES = 10_000, 2_000  # at most so many images, drawn by the seed: seconds on a CPU
NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's kNN protocol


@final
class KnnScore:
    """Top-1 in percent of `QUERIES` labelled images by their 20 nearest among `BANK` others; call it with an Encoder."""

    def __init__(self, bank: Source, queries: Source, *, batch_size: int, workers: int) -> None:
        self.bank, self.queries = bank, queries
        self.fingerprint = (
            f"{bank.fingerprint} {queries.fingerprint}"  # of the images; scores of others are not comparable
        )
        self.how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "cache": False}

    @classmethod
    def of(cls, run: Run) -> "KnnScore | None":
        """The score on a run's data: the images it trains on against those of the test split where there is one, else
        two parts of the images it trains on; of labelled images only. None where the images have no labels."""
        return cls._of(run, run.data, run.train_split, _test_split(run))

    @classmethod
    def to_decide(cls, run: Run, data: str, train_split: str | None = None) -> "KnnScore | None":
        """The score by which a step is chosen or a warning given: two parts of the images to train on, so that no image of
        another split has a part in it. None where the images have no labels."""
        if train_split == ALL or canonical_split(train_split or "train") == "test":
            train_split = None
        return cls._of(run, data, train_split, None)

    @classmethod
    def while_training(cls, run: Run) -> "dict[str, KnnScore]":
        """The scores of --knn-every: "knn" on --knn-data or the run's data, "knn_original" on --knn-original.

        On the run's data it is the same as at the end (`of`), unless the score decides: with --keep-best knn, or compared
        with the start weights (--init-from, --init-state). Raises UserError where images have no labels.
        """
        if not run.knn_every:
            return {}
        if run.knn_data is not None:
            score = cls.to_decide(run, run.knn_data)
        elif run.keep_best == DOMAIN or from_weights(run):
            score = cls.to_decide(run, run.data, run.train_split)
        else:
            score = cls.of(run)
        scores = {} if score is None else {DOMAIN: score}
        if run.knn_original is not None:
            original = cls.to_decide(run, run.knn_original)
            if original is None:
                raise UserError(f"--knn-original {run.knn_original} has no labels, one class only, or too few images")
            scores[ORIGINAL] = original
        if score is None and (run.knn_data or run.keep_best == DOMAIN or not scores):
            raise UserError(
                f"--knn-every {run.knn_every} scores by labels, and {run.knn_data or run.data} has none, one class only, "
                f"or too few images: leave the flag out, sort the images into one folder per class, or name labelled "
                f"images with --knn-data"
            )
        return scores

    @classmethod
    def _of(cls, run: Run, data: str, train_split: str | None, test: str | None) -> "KnnScore | None":
        allow_pixels(run.max_pixels)
        bank = _labelled(open_training(data, train_split))
        if bank is None or len(bank) < 5:
            return None
        order = numpy_generator(run.seed, "score").permutation(len(bank))
        if test is not None:
            queries = _labelled(open_source(data, test))
            if queries is None:
                return None
            queries = Subset(queries, numpy_generator(run.seed, "score").permutation(len(queries))[:QUERIES])
        else:
            query_count = min(QUERIES, len(bank) // 5)
            queries, order = Subset(bank, order[:query_count]), order[query_count:]
        return cls(Subset(bank, order[:BANK]), queries, batch_size=256, workers=run.workers or 0)

    def __call__(self, encoder: Encoder) -> float:
        return 100 * float(self.right(encoder).mean())

    def right(self, encoder: Encoder) -> np.ndarray:
        """For each of the queries whether its class is right, (n,) bool."""
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        sides = [extract(encoder, side, ("pooled",), device=device, **self.how) for side in (self.bank, self.queries)]
        (bank, bank_labels), (queries, labels) = [(side.features["pooled"], side.labels) for side in sides]
        similarity, index = nearest(torch.as_tensor(np.asarray(queries)), torch.as_tensor(np.asarray(bank)), NEIGHBOURS)
        assert bank_labels is not None  # `of` takes only labelled images
        assert labels is not None
        classes = int(max(bank_labels.max(), labels.max())) + 1
        votes = vote(similarity, index, torch.as_tensor(bank_labels), classes, TEMPERATURE, NEIGHBOURS)
        return (votes.argmax(1).cpu() == torch.as_tensor(labels)).numpy()


def share(top1: float, reference: float) -> float:
    """The share of its teacher's score that an encoder reaches; 0 where the teacher has none right."""
    return top1 / reference if reference else 0.0


def from_weights(run: Run) -> bool:
    """Whether the run starts from weights, with which its scores are compared."""
    return run.init_from is not None or run.init_state is not None


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
