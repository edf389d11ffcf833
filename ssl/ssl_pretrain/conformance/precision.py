"""Which operations of a loss take numbers of less than 32 bits, seen below autograd and autocast."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import backbones
from ..backbones.backbone import Backbone
from ..pretext import Method

# By their names in ATen, without underscores at either end (so in-place variants count, too).
LOSSES = {
    *("softmax", "log_softmax", "logsumexp", "logaddexp", "log", "log1p", "log2", "log10", "exp", "exp2", "expm1"),
    *("softplus", "log_sigmoid_forward", "special_entr", "xlogy", "special_xlog1py"),
    *("linalg_vector_norm", "norm", "foreach_norm", "cdist_forward", "euclidean_dist"),
    *("nll_loss_forward", "nll_loss2d_forward", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
    *("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"),
}
TO_A_SCALAR = {"sum", "nansum", "mean", "prod", "var", "std", "var_mean", "std_mean"}  # where nothing but () is left
# Of a layer (nn.LayerNorm, batch norm in a head) these are exempt: their kernels compute the statistics in float32.
NORMALISATIONS = {
    *("native_layer_norm", "native_group_norm", "native_batch_norm", "cudnn_batch_norm"),
    *("native_batch_norm_legit", "native_batch_norm_legit_functional", "native_batch_norm_legit_no_training"),
}
_TORCH, _HERE = Path(torch.__file__).parent, Path(__file__).parent
_BACKBONES = Path(backbones.__file__).parent


class NarrowLosses(TorchDispatchMode):
    """Lists in `found` every operation of a loss that takes less than float32, with the line that asked for it.

    Not looked at: what runs inside an encoder (a Backbone, or the blocks of `ssl_pretrain.backbones` in a decoder), and
    matrix products. Those are what mixed precision is for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.strip("_")
        normalisation = name in NORMALISATIONS
        scalar = name in TO_A_SCALAR and all(o.ndim == 0 for o in tree_leaves(out) if isinstance(o, Tensor))
        if normalisation or scalar or name in LOSSES:
            result_dtype = (kwargs or {}).get("dtype")  # sum(dtype=torch.float32) adds up in float32
            narrow = {i.dtype for i in tree_leaves(args) if isinstance(i, Tensor) and _is_narrow(i.dtype)}
            if narrow and (result_dtype is None or _is_narrow(result_dtype)):
                place = _place(sys._getframe(1), layers=not normalisation)
                if place is not None:
                    self.found.append(f"{name} takes {', '.join(sorted(map(str, narrow)))} at {place}")
        return out


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 4


def _place(frame: FrameType | None, *, layers: bool) -> str | None:
    """The innermost line outside torch, "package.module:12 in function". None inside an encoder, where only torch's own
    backward asks, and, unless `layers`, inside a layer of the method."""
    place = None
    while frame is not None:
        folder, owner = Path(frame.f_code.co_filename).parent, frame.f_locals.get("self")
        if isinstance(owner, Backbone) or folder == _BACKBONES:
            return None
        if not layers and isinstance(owner, nn.Module) and not isinstance(owner, Method):
            return None
        if place is None and folder != _HERE and _TORCH not in (folder, *folder.parents):
            place = f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno} in {frame.f_code.co_name}"
        if folder == _HERE and frame.f_code.co_name != "__torch_dispatch__":
            break  # who asked for this check does not matter
        frame = frame.f_back
    return place
