"""A model of a given size that takes a given time: the training of replication.py.

    PYTHONPATH=benchmarks deepspeed ... launch/train.py model._target_=wide.Wide model.kwargs.parameters=1000000 \
        model.kwargs.compute_s=0.5 model.kwargs.busy=false
"""

from __future__ import annotations

import time
from typing import Any

import torch


class Wide(torch.nn.Module):
    """A linear model, and ``parameters`` more that all have gradients.

    Args:
        compute_s: that a forward pass takes at least. busy: it computes meanwhile; else it waits, as a CPU does for a GPU.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        num_classes: int,
        layers: int,
        parameters: int,
        compute_s: float,
        busy: bool,
    ):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes)
        self.wide = torch.nn.Parameter(torch.zeros(parameters))
        self.compute_s, self.busy = compute_s, busy

    def forward(self, x: torch.Tensor, blocks: list[Any]) -> torch.Tensor:
        end = time.perf_counter() + self.compute_s
        if self.busy:
            while time.perf_counter() < end:
                torch.mm(x.T, x)
        else:
            time.sleep(self.compute_s)
        return self.linear(x[: blocks[-1].num_dst]) + self.wide.mean()
