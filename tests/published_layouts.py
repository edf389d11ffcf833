"""Models with random weights whose files have the layouts of published checkpoints."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracles import import_timm
from torch import Tensor, nn

SIDE, PATCH, DIM = 48, 8, 64  # pixels of an image and of a patch, width; a 6 x 6 grid


IMAGES = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def scatter(module: nn.Module, seed: int = 0) -> Any:
    """Every parameter moved at random, so that none has the value that its initialisation gave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def timm_vit(seed: int = 0, **options: Any) -> Any:
    """timm's ViT of this test's sizes."""
    kind = import_timm().models.vision_transformer.VisionTransformer
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": 3, "num_heads": 4, "num_classes": 0}
    return scatter(kind(**{**sizes, **options}), seed)


def sincos(side: int, dim: int, row_first: bool = False) -> np.ndarray:
    """Fixed positions (N, D) in float64, of the papers' formula: the column's half first, or MoCo v3's order."""
    table = np.zeros((side, side, dim))
    for y in range(side):
        for x in range(side):
            halves = []
            for position in (y, x) if row_first else (x, y):
                angles = [position / 10000 ** (k / (dim // 4)) for k in range(dim // 4)]
                halves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            table[y, x] = halves
    return table.reshape(side * side, dim)


def with_positions(model: Any, row_first: bool = False) -> Any:
    """A fixed table in the place of a timm model's learned one, zero for the class token."""
    table = torch.zeros_like(model.pos_embed)
    table[0, -36:] = torch.from_numpy(sincos(6, table.shape[2], row_first)).float()
    model.pos_embed.data = table
    return model


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def timm_beit(**options: Any) -> Any:
    """timm's BEiT of this test's sizes, its last norm on every token."""
    kind = import_timm().models.beit.Beit
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": 3, "num_heads": 4, "num_classes": 0}
    return scatter(kind(**{**sizes, "global_pool": "token", "use_abs_pos_emb": False, "init_values": 0.1, **options}))


BESIDE_BEIT = {"mask_token": torch.zeros(1, 1, DIM), "lm_head.weight": torch.zeros(8, DIM)}


def dinov3_names(model: Any) -> dict[str, Tensor]:
    """A timm model's weights under DINOv3's own names, with a bias of keys that its mask takes away."""
    weights = {}
    for name, value in model.state_dict().items():
        if name.endswith("q_bias"):
            biases = [value, torch.full_like(value, 9.0), model.state_dict()[name.replace("q_bias", "v_bias")]]
            mask = torch.cat([torch.ones_like(value), torch.zeros_like(value), torch.ones_like(value)])
            weights[name.replace("q_bias", "qkv.bias")] = torch.cat(biases)
            weights[name.replace("q_bias", "qkv.bias_mask")] = mask
        elif not name.endswith("v_bias"):
            name = (
                name.replace("gamma_1", "ls1.gamma")
                .replace("gamma_2", "ls2.gamma")
                .replace("reg_token", "storage_tokens")
            )
            if "mlp.fc1_g.weight" in "".join(model.state_dict()):
                name = name.replace("mlp.fc1_g", "mlp.w1").replace("mlp.fc1_x", "mlp.w2").replace("mlp.fc2", "mlp.w3")
            weights[name] = value
    head = model.embed_dim // 4
    weights["rope_embed.periods"] = torch.tensor([100.0 ** (k / (head // 4)) for k in range(head // 4)])
    weights["mask_token"] = torch.zeros(1, model.embed_dim)
    return weights
