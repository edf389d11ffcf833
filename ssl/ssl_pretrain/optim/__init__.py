"""Optimisers, parameter groups, learning-rate and weight-decay schedules."""

from .groups import decays, parameter_groups
from .optimizer import build, clip_, gradient_norms, set_rates, step_unless
from .state import empty_state, load_state_by_name, state_by_name

__all__ = [
    "build",
    "clip_",
    "decays",
    "empty_state",
    "gradient_norms",
    "load_state_by_name",
    "parameter_groups",
    "set_rates",
    "state_by_name",
    "step_unless",
]
