"""Learning-rate schedules. Pure."""

from __future__ import annotations

import math

from gemini_gnn.config import OptimizerConfig


def lr_factor(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """The factor of ``optimizer.lr`` at optimizer step ``step`` (0-based) of ``total_steps``.

    Linear warm-up over ``warmup_steps``, then constant, linear to 0, half a cosine to 0 (Loshchilov & Hutter 2017,
    without restarts), or ``step_gamma`` every ``step_every`` steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = step - config.warmup_steps
    span = max(1, total_steps - config.warmup_steps)
    if config.schedule == "linear":
        return max(0.0, 1.0 - done / span)
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done / span)))
    if config.schedule == "step":
        return config.step_gamma ** (done // config.step_every)
    return 1.0
