"""Everything a trainer imports and compiles, ready: the warm parent loads this once and forks trainers that have it.

Compiled kernels are loaded here too (0.5 s each trainer would spend before its first step) by one pass over a graph of two
nodes. No operation here may start a thread: a forked child would wait for it for ever. Kernels are single-threaded, tensors
have a few elements, nothing runs backward; the warm parent checks before each fork that it still has one thread.
"""

from __future__ import annotations

import numpy as np
import safetensors.torch  # noqa: F401
import torch
import torch.utils.tensorboard
import yaml  # noqa: F401

import gemini_gnn.snapshot.session
import gemini_gnn.training.job  # noqa: F401
from gemini_gnn.config import ModelConfig
from gemini_gnn.halo.rows import copy_ranges, copy_rows
from gemini_gnn.models.build import build_model
from gemini_gnn.models.tensors import to_tensors
from gemini_gnn.sampling.in_edges import ReplicatedInEdges
from gemini_gnn.sampling.sampler import NeighborSampler


def _warm_up() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    in_edges = ReplicatedInEdges(np.array([0, 1, 2]), np.array([1, 0], dtype=np.int32), np.arange(2))
    batch = NeighborSampler(in_edges, [1, 1], seed=0).sample(np.array([0]), 0, 0)
    x = torch.zeros(2, 2)
    index = np.zeros(1, dtype=np.int64)
    copy_rows(x, index, torch.zeros(2, 2), index)
    for dtype in (torch.int32, torch.bfloat16):  # columns and float32 values; bfloat16 values
        copy_ranges(torch.zeros(1, dtype=dtype), index, torch.zeros(1, dtype=dtype), index, index)
    model = build_model(ModelConfig(hidden=2, layers=2), 2, 2, seed=0).eval()
    with torch.no_grad():
        model(x[: batch.blocks[0].num_src], [to_tensors(block, "cpu") for block in batch.blocks])
    torch.set_num_threads(threads)


_warm_up()
