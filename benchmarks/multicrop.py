"""Cost of DINO's 2 + 8 crops: the method's student forward compared with the same tokens packed through the blocks.

    python benchmarks/multicrop.py [--encoder vit_small] [--images 4] [--rounds 5] [--backward]

ours: the two global crops (224 pixels) and the eight local ones (96) as `methods/dino.py` gives them to the encoder, in
one call. apart: the encoder once for each size. packed: the tokens of all crops in one sequence for norms, QKV,
projections and MLPs, split only for attention (grouped SDPA); this script implements it with the encoder's weights. All
compute the same function: their outputs are compared first. They alternate in one process, on two threads or the GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pretrain import backbones
from ssl_pretrain.backbones.vit import Block, ViT

GLOBAL, LOCAL = (2, 224), (8, 96)


def packed(vit: ViT, groups: list[Tensor]) -> list[Tensor]:
    """CLS tokens (B, D) of groups of images (B, 3, H, W)."""
    tokens = []
    for images in groups:
        tokens.append(vit._positioned(vit.patch_embed(images), vit._grid(*images.shape[2:]), None))
    shapes = [t.shape for t in tokens]
    x = torch.cat([t.flatten(0, 1) for t in tokens])  # (all tokens, D)
    bounds = [s[0] * s[1] for s in shapes]
    for block in cast("list[Block]", list(vit.blocks)):
        heads = block.attn.heads
        qkv = block.attn.qkv(block.norm1(x))
        mixed = []
        for part, (count, length, dim) in zip(qkv.split(bounds), shapes, strict=True):
            q, k, v = part.view(count, length, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
            mixed.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, dim))
        x = x + block.ls1(block.attn.proj(torch.cat(mixed)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = vit.norm(x)
    return [part.view(shape)[:, 0] for part, shape in zip(x.split(bounds), shapes, strict=True)]


def main() -> None:
    """Compare, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_small")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    vit = backbones.build(options.encoder, image_size=(224, 224), in_chans=3, patch_size=16, pool="cls").to(device)
    assert isinstance(vit, ViT)
    groups = [torch.randn(count * options.images, 3, side, side, device=device) for count, side in (GLOBAL, LOCAL)]

    ways: dict[str, Callable[[], list[Tensor]]] = {
        "ours": lambda: [features.pooled for features in vit.forward_crops([(images, {}) for images in groups])],
        "apart": lambda: [vit(images).pooled for images in groups],
        "packed": lambda: packed(vit, groups),
    }
    with torch.no_grad():
        for way in ("apart", "packed"):
            for a, b in zip(ways["ours"](), ways[way](), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # a busy machine slows both alike
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, run in ways.items():
            began = clock()
            with torch.set_grad_enabled(options.backward):
                found = run()
                if options.backward:
                    torch.cat(found).square().sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                taken[name].append(clock() - began)
    for name, each in taken.items():
        ratio = statistics.median(a / b for a, b in zip(taken["ours"], each, strict=True))
        print(f"{name:<8}{1e3 * statistics.median(each):>10.1f} ms   ours / {name} {ratio:.2f}")


if __name__ == "__main__":
    main()
