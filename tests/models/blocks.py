"""Blocks for the tests of models, made the slow and obvious way, and the PyG edges that mean the same."""

from __future__ import annotations

import numpy as np
import torch

from gemini_gnn.models.tensors import BlockTensors, SparseFeatures, to_tensors
from gemini_gnn.sampling.blocks import Block


def make_block(
    num_src: int, num_dst: int, edges: list[tuple[int, int]], degree=None, src_degree=None, weight=None
) -> Block:
    """A block from (source, destination) pairs; degrees default to those in the block itself."""
    order = sorted(range(len(edges)), key=lambda e: (edges[e][1], e))
    src = np.array([edges[e][0] for e in order], dtype=np.int64)
    dst = np.array([edges[e][1] for e in order], dtype=np.int64)
    edge_t = np.array(sorted(range(len(edges)), key=lambda e: (src[e], e)), dtype=np.int64)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(dst, minlength=num_dst))]).astype(np.int64)
    indptr_t = np.concatenate([[0], np.cumsum(np.bincount(src, minlength=num_src))]).astype(np.int64)
    if degree is None:
        degree = np.diff(indptr)
    if src_degree is None:
        src_degree = np.concatenate([degree, np.full(num_src - num_dst, 3)])
    return Block(
        num_src=num_src,
        num_dst=num_dst,
        indptr=indptr,
        indices=src,
        indptr_t=indptr_t,
        indices_t=dst[edge_t],
        edge_t=edge_t,
        degree=np.asarray(degree, dtype=np.int64),
        src_degree=np.asarray(src_degree, dtype=np.int64),
        edge_weight=None if weight is None else np.asarray(weight, dtype=np.float32)[order],
    )


def random_block(
    num_src: int, num_dst: int, num_edges: int, seed: int = 0, loops: bool = True, weighted: bool = False
) -> Block:
    """Random edges: duplicates, destinations without edges and, when ``loops``, self-loops occur."""
    rng = np.random.default_rng(seed)
    edges: list[tuple[int, int]] = []
    while len(edges) < num_edges:
        source, target = int(rng.integers(num_src)), int(rng.integers(num_dst))
        if loops or source != target:
            edges.append((source, target))
    return make_block(num_src, num_dst, edges, weight=rng.random(num_edges) + 0.5 if weighted else None)


def whole_graph(nodes: int, num_edges: int, seed: int = 0, loops: bool = False, weighted: bool = False) -> BlockTensors:
    """A block with every node on both sides: a layer on it is a layer on a whole graph."""
    block = random_block(nodes, nodes, num_edges, seed, loops, weighted)
    return to_tensors(
        Block(**{**{f: getattr(block, f) for f in block.__dataclass_fields__}, "src_degree": block.degree}), "cpu"
    )


def edge_index(block: BlockTensors) -> torch.Tensor:
    """PyG's ``[2, edges]`` (source, target), in the block's order."""
    targets = torch.repeat_interleave(torch.arange(block.num_dst), block.indptr[1:] - block.indptr[:-1])
    return torch.stack([block.indices, targets])


def empty_block(num_src: int, num_dst: int) -> BlockTensors:
    return to_tensors(make_block(num_src, num_dst, []), "cpu")


def sparse_features(rows: int, width: int, filled: float = 0.3, seed: int = 0, ones: bool = False) -> SparseFeatures:
    """Random rows; the first is empty, and so is the last column."""
    rng = np.random.default_rng(seed)
    stored = rng.random((rows, width)) < filled
    stored[:1], stored[:, -1:] = False, False
    ptr = np.concatenate([[0], np.cumsum(stored.sum(1))])
    value = None if ones else torch.from_numpy(rng.standard_normal(ptr[-1], dtype=np.float32))
    return SparseFeatures(torch.from_numpy(ptr), torch.from_numpy(np.nonzero(stored)[1].astype(np.int32)), value, width)
