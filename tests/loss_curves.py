"""Loss curves of one run on one process, on two, and on one whose weights were changed by rounding-sized noise.

    python loss_curves.py OUT NOISE FLAGS ...

trains as `ssl-pretrain FLAGS --out OUT` does. NOISE: the relative deviation of normal noise on every weight at the start, a
control: what a difference of the size of a rounding error becomes after some steps.
"""

import sys

import torch
from ssl_pretrain.launch.pretrain import main

from ssl_pretrain import train
from ssl_pretrain.randomness import key


def add_noise(deviation: float, seed: int) -> None:
    """Let every run of this process begin with weights w * (1 + deviation * n), n normal."""
    build = train._build_method

    def noisy(*arguments: object) -> object:
        method, *rest = build(*arguments)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(key("noise", seed))
        with torch.no_grad():
            for parameter in method.parameters():
                parameter *= 1 + deviation * torch.randn(parameter.shape, generator=generator)
        return method, *rest

    train._build_method = noisy  # type: ignore[assignment]


if __name__ == "__main__":
    if float(sys.argv[2]):
        add_noise(float(sys.argv[2]), 0)
    sys.exit(main([*sys.argv[3:], "--out", sys.argv[1]]))
