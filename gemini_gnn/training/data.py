"""From (step, micro-batch) to tensors: the way of a batch, in one direction.

seeds -> sampled blocks -> features of the input nodes -> labels of the seeds. Runs in the prefetcher's background thread;
everything here is a pure function of its key and the partitioned graph, so a batch made ahead, made late or made again
after a recovery is the same batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gemini_gnn.config import Config
from gemini_gnn.errors import DataError, PartitionError
from gemini_gnn.features.store import FeatureStore, Prepared
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.graph.sparse import SparseRows, sparse
from gemini_gnn.halo.exchange import HaloExchange
from gemini_gnn.models.tensors import BlockTensors, SparseFeatures, moved, moved_features, pinned, to_tensors
from gemini_gnn.recovery import board
from gemini_gnn.sampling.batches import BatchPlan
from gemini_gnn.sampling.in_edges import InEdges, ReplicatedInEdges
from gemini_gnn.sampling.partitioned import PartitionedInEdges
from gemini_gnn.sampling.sampler import NeighborSampler
from gemini_gnn.training.groups import Groups


@dataclass(frozen=True)
class Key:
    """Which micro-batch: optimizer step (0-based, over the whole run), its epoch, and the batch index in the epoch."""

    step: int
    epoch: int
    index: int


@dataclass(frozen=True)
class PreparedBatch:
    """A batch in host memory of which only the remote rows are missing; the seconds went into it, as in :class:`MicroBatch`."""

    key: Key
    rows: Prepared
    y: torch.Tensor
    blocks: list[BlockTensors]
    edges: int
    sample_s: float
    prepare_s: float
    sample_cpu_s: float
    prepare_cpu_s: float


@dataclass(frozen=True)
class MicroBatch:
    """A batch as the model takes it.

    Attributes:
        x: ``[inputs, features]``, dense, or sparse for a model that takes it so, y: ``[seeds]`` int64 or ``[seeds, classes]``
        float32, blocks: input side first.
        sample_s, fetch_s: seconds spent on sampling and on the features, the exchange included, of which
        transfer_s: moving data between ranks, meet_s: waiting for the slowest rank to come to the exchange.
        sample_cpu_s, fetch_cpu_s: of sample_s and fetch_s the CPU time of the thread that made it.
    """

    key: Key
    x: torch.Tensor | SparseFeatures
    y: torch.Tensor
    blocks: list[BlockTensors]
    edges: int
    sample_s: float
    fetch_s: float
    transfer_s: float
    meet_s: float
    sample_cpu_s: float = 0.0
    fetch_cpu_s: float = 0.0


class BatchSource:
    """Makes the micro-batches of one rank. One thread at a time may call :meth:`make`.

    Attributes:
        x: the features of the owned nodes, in the form that ``features.layout`` asks for.
        dense: give the rows of sparse features to the model as a dense tensor. The loop says so, once it has the model.

    Raises:
        PartitionError: the graph has not one part per rank.
        DataError: it has no labels to train on.
    """

    def __init__(self, graph: PartitionedGraph, config: Config, groups: Groups):
        if graph.parts != groups.world_size:
            raise PartitionError(
                f"the graph in {graph.folder} has {graph.parts} parts, the job has {groups.world_size} ranks: expected "
                f"one part per rank; start {graph.parts} ranks or make one with partition.parts={groups.world_size}"
            )
        if graph.num_classes == 0 or not sum(graph.meta.train):
            raise DataError(
                f"the graph in {graph.folder} has no labelled training nodes: expected labels and a training split; "
                "give dataset.labels=FILE (and dataset.splits=FILE), or another data set"
            )
        if not sum(graph.meta.val):
            raise DataError(
                f"the graph in {graph.folder} has no validation nodes: expected some, by which the best model is chosen; "
                "give a split with them (dataset.splits=FILE, dataset.split='random:0.6,0.2,0.2', or a val_mask)"
            )
        self.graph, self.rank, self.device = graph, groups.rank, groups.device
        self.remote_bytes = 0  # received by the halo exchange so far; written by the thread that makes batches
        self.part = graph.part(groups.rank)
        self.x = in_layout(self.part.x, config.features.layout, graph.parts)
        self.dense = False
        self.exchange = make_exchange(graph, config, groups, groups.halo)
        self._partitioned = config.sampling.topology == "partitioned"
        self.sampler = NeighborSampler(
            self.in_edges_over(self.exchange), config.sampling.fanouts, config.seed, config.sampling.weighted
        )
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        x, begin, end = self.x, self.part.begin, self.part.end
        # In another form or type than the file's each rank has rows of its own.
        self.shared = config.features.shared and x is self.part.x and dtype == torch.float32 and len(groups.machine) > 1
        if self.shared:
            begin, end = int(graph.bounds[groups.machine[0]]), int(graph.bounds[groups.machine[-1] + 1])
            x = graph.x[begin:end]
        self.store = FeatureStore(
            x, begin, end, self.exchange, in_ram=config.features.in_ram, dtype=dtype, shared=self.shared
        )
        seeds = [graph.train_seeds(p) for p in range(graph.parts)]
        self.plan = BatchPlan(seeds, graph.original, config.sampling.batch_size, config.sampling.order, config.seed)
        self.accumulation = config.training.accumulation
        self.steps_per_epoch = -(-self.plan.batches_per_epoch // self.accumulation)

    def in_edges_over(self, exchange: HaloExchange) -> InEdges:
        """The in-edges to sample from; hops across the border of a partitioned one travel over ``exchange``."""
        graph = self.graph
        if self._partitioned:
            own = self.part
            return PartitionedInEdges(
                own.colptr, own.row, own.original, graph.bounds, own.part, exchange, own.edge_weight
            )
        return ReplicatedInEdges(graph.colptr, graph.row, graph.original, graph.edge_weight)

    def step_keys(self, step: int) -> list[Key]:
        epoch, within = divmod(step, self.steps_per_epoch)
        return [Key(step, epoch, within * self.accumulation + micro) for micro in range(self.accumulation)]

    def seeds_in_step(self, step: int) -> int:
        """Seeds of the step over all ranks and micro-batches: what its loss is the mean over."""
        return sum(self.plan.global_count(key.epoch, key.index) for key in self.step_keys(step))

    def prepare(self, key: Key) -> PreparedBatch:
        """Sample the blocks, and read the own rows of the features. Collective only where in-edges are partitioned."""
        began, cpu = time.perf_counter(), time.thread_time()
        board.doing(board.Phase.SAMPLING)
        batch = self.sampler.sample(self.plan.seeds(key.epoch, key.index, self.rank), key.epoch, key.index)
        sampled, sampled_cpu = time.perf_counter(), time.thread_time()
        rows = self.store.prepare(batch.input_nodes)
        y = labels(self.part.y, batch.seeds - self.part.begin)
        blocks = [to_tensors(block) for block in batch.blocks]
        if self.device.type == "cuda":
            y, blocks = y.pin_memory(), [pinned(block) for block in blocks]
        return PreparedBatch(
            key=key,
            rows=rows,
            y=y,
            blocks=blocks,
            edges=batch.num_edges,
            sample_s=sampled - began,
            prepare_s=time.perf_counter() - sampled,
            sample_cpu_s=sampled_cpu - cpu,
            prepare_cpu_s=time.thread_time() - sampled_cpu,
        )

    def complete(self, prepared: PreparedBatch) -> MicroBatch:
        """Fetch the remote rows, and move all of it to the device. Collective."""
        began, cpu = time.perf_counter(), time.thread_time()
        board.doing(board.Phase.EXCHANGE)
        x = moved_features(self.store.complete(prepared.rows), self.device, self.dense)
        y = prepared.y.to(self.device, non_blocking=True)
        blocks = [moved(block, self.device) for block in prepared.blocks]
        fetch_s = prepared.prepare_s + time.perf_counter() - began
        board.doing(board.Phase.SAMPLING)
        traffic = self.exchange.take_traffic()
        self.remote_bytes += int(traffic.received_bytes.sum())
        return MicroBatch(
            key=prepared.key,
            x=x,
            y=y,
            blocks=blocks,
            edges=prepared.edges,
            sample_s=prepared.sample_s,
            fetch_s=fetch_s,
            transfer_s=traffic.seconds - traffic.meet_s,
            meet_s=traffic.meet_s,
            sample_cpu_s=prepared.sample_cpu_s,
            fetch_cpu_s=prepared.prepare_cpu_s + time.thread_time() - cpu,
        )

    def make(self, key: Key) -> MicroBatch:
        return self.complete(self.prepare(key))

    def stages(self, backend: str) -> tuple[Callable[[Key], Any], Callable[[Any], MicroBatch] | None]:
        """``prepare`` for the prefetcher's thread, ``complete`` for the training thread when it takes a batch.

        With gloo everything happens ahead. With NCCL the training thread issues every collective, at one point of the
        step: two communicators used from two threads deadlock unless all ranks issue in one order.
        """
        if backend == "gloo":
            return self.make, None
        if self._partitioned:
            return (lambda key: key), self.make
        return self.prepare, self.complete


def in_layout(x: np.ndarray | SparseRows, layout: str, parts: int) -> np.ndarray | SparseRows:
    """The features of one of ``parts`` parts as ``features.layout`` asks for them; auto: as the folder holds them."""
    if isinstance(x, SparseRows):
        return x.dense() if layout == "dense" else x
    if layout != "sparse":
        return x
    rows = sparse(x)
    # Ranks exchange values or they do not, all of them. One part cannot know whether all values of the others are 1.
    return rows if parts == 1 else replace(rows, value=rows.values())


def features_said(source: BatchSource, model: torch.nn.Module) -> list[str]:
    """Which form the features of this rank have, and what that saves; nothing where the other form was never counted."""
    rows = next((x for x in (source.x, source.part.x) if isinstance(x, SparseRows)), None)
    if rows is None:
        return []
    mb = {"sparse": rows.nbytes / 1e6, "dense": rows.dense_bytes / 1e6}
    form, other = ("sparse", "dense") if rows is source.x else ("dense", "sparse")
    where = "in memory" if source.graph.parts == 1 else f"in memory of rank {source.rank}"
    said = [
        f"features: {form}, {mb[form]:,.1f} MB {where} ({other}: {mb[other]:,.1f} MB); "
        f"features.layout={other} chooses the other"
    ]
    if form == "sparse" and source.device.type == "cuda":
        said.append("on the GPU the features of each batch are dense")
    elif form == "sparse" and source.dense:
        said.append(
            f"the rows of each batch are made dense: {type(model).__name__} takes no sparse features here (a class of "
            "your own that does declares takes_sparse = True)"
        )
    return said


def make_exchange(graph: PartitionedGraph, config: Config, groups: Groups, group: Any) -> HaloExchange:
    return HaloExchange(
        group,
        graph.bounds,
        groups.rank,
        chunk_bytes=config.sampling.chunk_bytes,
        timeout_s=config.distributed.timeout_s,
        device=groups.device,
    )


def labels(y: np.ndarray, local: np.ndarray) -> torch.Tensor:
    """Labels of nodes as the loss takes them: int64 classes, or float32 0/1 rows."""
    picked = y[local]
    return torch.from_numpy(picked.astype(np.int64 if y.ndim == 1 else np.float32))
