"""Weight initialisations from papers."""

from torch import nn


def xavier_(module: nn.Module) -> None:
    """MAE's initialisation (appendix A.1, as released): Xavier uniform with zero bias for every linear layer and for
    the patch convolution (as a linear layer); layer norms 1 and 0. Tokens are initialised by their modules."""
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
