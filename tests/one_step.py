"""One forward and backward of a method, alone or as one rank of several, for the tests that compare them.

    python one_step.py METHOD OUT [micro-batches]       (ranks from the environment, as the command finds them)

Rank 0 writes OUT.pt: the global loss, every parameter's gradient and the state after the step.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from ssl_pretrain import backbones, distributed, pretext
from ssl_pretrain.data.loader import Share
from ssl_pretrain.data.views import fitted
from ssl_pretrain.loop import grad_cache
from ssl_pretrain.pretext import Batch, Step, WholeBatchMethod
from ssl_pretrain.randomness import key

BATCH, SIZE = 16, (32, 32)
# Small enough for a test; a method's file needs no entry here unless its defaults are too big.
SMALL = {
    "supervised": {"classes": 6},
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    "simclr": {"hidden_dim": 64, "embedding_dim": 32},
    "lejepa": {"hidden_dim": 64, "embedding_dim": 16, "slices": 32, "local_views": 2},
    "dino": {"hidden_dim": 64, "bottleneck_dim": 16, "prototypes": 48, "local_views": 2},
    "aim": {"head_dim": 32, "head_depth": 1},
    "ijepa": {"predictor_dim": 32, "predictor_depth": 1, "predictor_heads": 2},
    "data2vec2": {"masks": 2, "decoder_depth": 2},
    "semaim": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    "byol": {"hidden_dim": 64, "embedding_dim": 16},
    "simsiam": {"hidden_dim": 64, "embedding_dim": 32, "bottleneck_dim": 16},
    "mocov3": {"hidden_dim": 64, "embedding_dim": 16},
    "nnclr": {"queue": 40, "hidden_dim": 64, "predictor_dim": 64, "embedding_dim": 16, "temperature": 0.5},
    "ibot": {"hidden_dim": 64, "bottleneck_dim": 16, "prototypes": 48, "local_views": 2},
    # KoLeo of class tokens that LayerScale keeps nearly equal magnifies rounding errors: it has its own test of two ranks.
    "dinov2": {"hidden_dim": 64, "bottleneck_dim": 16, "prototypes": 48, "local_views": 2, "regulariser": "kde"},
    "npid": {"embedding_dim": 16, "negatives": 8},
    "barlow": {"projector_dim": 32},
    # The paper's weights over 25: the tolerances of gradients are absolute.
    "vicreg": {"projector_dim": 32, "invariance_weight": 1.0, "variance_weight": 1.0, "covariance_weight": 0.04},
    "swav": {"hidden_dim": 64, "embedding_dim": 16, "prototypes": 24, "local_views": 2, "queue": 24},
    "msn": {"hidden_dim": 64, "embedding_dim": 16, "prototypes": 24, "local_views": 2},
}


def build(name: str, **knobs: object) -> pretext.Method:
    """A small instance of the method, its weights a function of its name."""
    kind = pretext.load(name)
    torch.manual_seed(key("one step", name))
    options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 2, **kind.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=SIZE, **options)
    method = kind(encoder, kind.Config(**{**SMALL.get(name, {}), **knobs}))
    method.prepare(BATCH)
    return method


def batch(method: pretext.Method, rows: slice) -> Batch:
    """Rows of a global batch of noise images, with the views the method declares."""
    views = {}
    for spec in fitted(type(method).views(method.config, SIZE), SIZE, method.encoder.stride):
        generator = torch.Generator().manual_seed(key("view", spec.name))
        images = torch.randn(spec.count, BATCH, 3, *spec.size, generator=generator)[:, rows]
        views[spec.name] = images if spec.count > 1 else images[0]
    return Batch(views=views, index=torch.arange(BATCH)[rows], labels=torch.arange(BATCH)[rows] % 4)


def _step(rows: slice) -> Step:
    return Step(step=3, total=10, noise=7, rows=rows, batch_size=BATCH, device=torch.device("cpu"))


def after_step(method: pretext.Method, step: Step, carried: dict[str, torch.Tensor]) -> None:
    """The method's, as the loop calls it, with what forwards carried."""
    step.carried = carried
    method.after_step(step)


def one_step(name: str, micro_batches: int = 1) -> dict:
    """Loss, gradients and state of one step on this process's share of the batch."""
    with distributed.world() as here:
        method = build(name)
        share = Share(BATCH, micro_batches, here.rank, here.size)
        wrapped = DistributedDataParallel(method) if here.size > 1 else method
        parts = [(batch(method, share.rows(micro)), _step(share.rows(micro))) for micro in range(micro_batches)]
        results = []
        if isinstance(method, WholeBatchMethod) and micro_batches > 1:
            results.append(grad_cache.backward(method, parts, nullcontext(), list(method.parameters())))
        else:
            for micro, part in enumerate(parts):
                last = micro == micro_batches - 1
                with nullcontext() if last or here.size == 1 else wrapped.no_sync():
                    results.append(wrapped(*part))
                    (results[-1].total / micro_batches).backward()
        carried = {name: torch.cat([each.carry[name] for each in results]) for name in results[0].carry}
        after_step(method, parts[-1][1], carried)
        loss = torch.stack([each.total.detach() for each in results]).mean()
        loss = distributed.all_reduce_(loss) / here.size
        return {
            "rank": here.rank,
            "loss": loss,
            "gradients": {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None},
            "trainable": [n for n, p in method.named_parameters() if p.requires_grad],
            "state": {n: v.clone() for n, v in method.state_dict().items()},
        }


if __name__ == "__main__":
    result = one_step(sys.argv[1], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    if result["rank"] == 0:
        torch.save(result, Path(sys.argv[2]).with_suffix(".pt"))
