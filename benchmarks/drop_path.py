"""Cost of drop path: forward and backward of a ViT on DINOv2's crops without drop path, by factors, and by rows.

    python benchmarks/drop_path.py [--encoder vit_small] [--images 16] [--rate 0.3] [--rounds 5] [--precision fp32]

The crops of each image (two of 224 pixels, eight of 96) pass the encoder in one call. Variants alternate in one
process, on one thread or the GPU; compare the ratios of the medians. Memory: bytes that are stored for the backward
pass.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain import backbones
from ssl_pretrain.backbones.backbone import Backbone

GLOBAL, LOCAL = (2, 224), (8, 96)


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_small")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    crops = [torch.randn(count * options.images, 3, side, side, device=device) for count, side in (GLOBAL, LOCAL)]
    dropped = {"drop_path": options.rate, "drop_path_uniform": True}
    variants: dict[str, dict[str, Any]] = {"nothing": {}, "factors": dropped, "rows": dropped | {"drop_rows": True}}
    models = {}
    for name, how in variants.items():
        torch.manual_seed(0)
        models[name] = backbones.build(
            options.encoder, image_size=(224, 224), patch_size=16, pool="cls", layer_scale=1.0, **how
        ).to(device)

    def step(model: Backbone) -> float:
        batches = [(x, {"drop": torch.rand(len(x), 2 * model.depth, device=device)}) for x in crops]
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            found = model.forward_crops(batches)
        torch.stack([features.patches.float().square().mean() for features in found]).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def kept(model: Backbone) -> int:
        sizes: dict[int, int] = {}

        def seen(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
            step(model)
        return sum(sizes.values())

    memory = {name: kept(model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, model in models.items():
            times[name].append(step(model))
    what = f"{options.encoder}, {options.images} images x (2 + 8) crops, drop path {options.rate}"
    print(f"{what}, {options.precision}, {device}")
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, seconds in medians.items():
        time_of, memory_of = seconds / medians["nothing"], memory[name] / memory["nothing"]
        mib = memory[name] / 2**20
        print(f"{name:8s} {1000 * seconds:8.0f} ms  {time_of:.2f} of the time  {mib:7.0f} MiB  {memory_of:.2f}")


if __name__ == "__main__":
    main()
