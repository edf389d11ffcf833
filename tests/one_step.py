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
from ssl_pretrain.pretext import Batch, Step
from ssl_pretrain.randomness import key

BATCH, SIZE = 16, (32, 32)
# Small enough for a test; a method's file needs no entry here unless its defaults are too big.
SMALL = {"mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}}


def build(name: str) -> pretext.Method:
    """A small instance of the method, its weights a function of its name."""
    kind = pretext.load(name)
    torch.manual_seed(key("one step", name))
    options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 2, **kind.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=SIZE, **options)
    return kind(encoder, kind.Config(**SMALL.get(name, {})))


def batch(method: pretext.Method, rows: slice) -> Batch:
    """Rows of a global batch of noise images, with the views the method declares."""
    views = {}
    for spec in type(method).views(method.config, SIZE):
        generator = torch.Generator().manual_seed(key("view", spec.name))
        images = torch.randn(spec.count, BATCH, 3, *spec.size, generator=generator)[:, rows]
        views[spec.name] = images if spec.count > 1 else images[0]
    return Batch(views=views, index=torch.arange(BATCH)[rows], labels=torch.arange(BATCH)[rows] % 4)


def one_step(name: str, micro_batches: int = 1) -> dict:
    """Loss, gradients and state of one step on this process's share of the batch."""
    with distributed.world() as here:
        method = build(name)
        share = Share(BATCH, micro_batches, here.rank, here.size)
        wrapped = DistributedDataParallel(method) if here.size > 1 else method
        loss = torch.zeros(())
        for micro in range(micro_batches):
            rows = share.rows(micro)
            step = Step(step=3, total=10, noise=7, rows=rows, batch_size=BATCH, device=torch.device("cpu"))
            last = micro == micro_batches - 1
            with nullcontext() if last or here.size == 1 else wrapped.no_sync():
                losses = wrapped(batch(method, rows), step)
                (losses.total / micro_batches).backward()
            loss += losses.total.detach() / micro_batches
        method.after_step(step)
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
