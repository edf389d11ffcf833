"""One optimiser with Muon for the encoder's matrices and AdamW for all other parameters."""

from typing import Any, final

import torch

from .adamw import AdamW


@final
class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) on the groups marked
    "matrices", fused AdamW on the others.

    Muon's steps are scaled to the root mean square of AdamW's (Liu et al., "Muon is Scalable for LLM Training", 2025,
    section 2.2), so both use the same learning rate and weight decay. Unlike the fused optimisers it cannot skip a step
    on the device: with the attribute `found_inf` the host synchronises with the device once per step.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0})
        parts: list[torch.optim.Optimizer] = []
        matrices = [group for group in self.param_groups if group["matrices"]]
        others = [group for group in self.param_groups if not group["matrices"]]
        if matrices:
            parts.append(torch.optim.Muon(matrices, lr=0.0, adjust_lr_fn="match_rms_adamw"))
        if others:
            parts.append(AdamW(others, betas=betas))
        self._parts = parts
        # One list of groups and one state, so that setting rates and saving checkpoints work as for any optimiser.
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        found = getattr(self, "found_inf", None)
        if found is not None and bool(found):
            return
        for part in self._parts:
            part.step()
