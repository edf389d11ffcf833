"""Weight initialisations that papers name."""

from torch import nn


def xavier_(module: nn.Module) -> None:
    """MAE's initialisation (appendix A.1, as released): every linear map, and a patch convolution seen as one, Xavier
    uniform with zero bias; layer norms 1 and 0. Tokens are left to their owner."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        else:
            continue
        if not isinstance(part, nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)
