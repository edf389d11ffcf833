"""The low-rank updates of a run with --adapters: added to its encoder, and merged in what it exports."""

import torch

from .. import encoder
from ..backbones import adapters
from ..backbones.backbone import Backbone
from ..config import Resolved
from ..encoder import Encoder
from ..randomness import key
from ..rates import Rate


def add(run: Resolved, backbone: Backbone) -> list[str]:
    """Freeze the encoder and add the updates that the run trains, whose initial values depend only on its seed. Returns
    what is to be said about it, a line each. Raises UserError for an encoder that cannot have them."""
    if run.adapters == "none":
        return []
    generator = torch.Generator().manual_seed(key(run.seed, "adapters"))
    alpha = run.lora_rank if run.lora_alpha is None else run.lora_alpha
    return [adapters.train_updates(backbone, run.lora_rank, alpha, run.adapters_unfreeze, generator)]


def rates(run: Resolved) -> tuple[Rate, ...]:
    """Updates have no weight decay: it would pull towards the start weights, as an anchor does."""
    return () if run.adapters == "none" else (Rate(adapters.NAMES, decay=0.0),)


def merged(run: Resolved, adapted: Encoder) -> Encoder:
    """What is exported: the encoder itself, or with the updates merged a plain one, proven equal."""
    if run.adapters == "none":
        return adapted
    plain = encoder.another(adapted.name, adapted.backbone)
    adapters.merge_into(plain, adapted.backbone)
    return Encoder(plain, adapted.name, adapted.preprocessing, adapted.lineage)
