"""The training loop of one rank.

Ownership: the training thread owns model, engine, the world and evaluation groups; the prefetcher's thread owns the
sampler, the feature store and the halo group. Every rank makes the same sequence of collectives: the number of
batches, the decision to stop and the decision to capture are pure functions or agreed values, never private ones. The
agreement is one small all-reduce per step between backward and gradient reduction (:func:`agree`). If a rank dies, it
raises on the others.

Interruptions: a step that has not reached its end leaves no trace but lines in event logs; losses.csv is appended after
the step and trimmed on resume.
"""

from __future__ import annotations

import collections
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from gemini_gnn.config import Config
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.hashing import DROPOUT, stream
from gemini_gnn.models.build import build_model
from gemini_gnn.models.tensors import needs_dense
from gemini_gnn.observe.events import EventLog
from gemini_gnn.observe.progress import Progress
from gemini_gnn.recovery import board
from gemini_gnn.recovery.board import Milestone, Phase
from gemini_gnn.recovery.worker.entry import stop_requested
from gemini_gnn.sampling.sampler import NeighborSampler
from gemini_gnn.training import engine as deepspeed_engine
from gemini_gnn.training import metrics
from gemini_gnn.training.data import BatchSource, MicroBatch, make_exchange
from gemini_gnn.training.evaluate import Evaluation
from gemini_gnn.training.groups import Groups
from gemini_gnn.training.prefetch import prefetch
from gemini_gnn.training.report import Report
from gemini_gnn.training.state import RunState, evaluation_due, record_evaluation


class SnapshotHooks(Protocol):
    """The calls of the loop to snapshots; ``snapshot.attach`` and the NFS baseline implement them."""

    restored: Any  # None: training begins at step 0

    def ready(self) -> bool: ...

    def before_step(self) -> None: ...

    def after_step(self, step: int, capture: bool) -> None: ...

    def final(self, step: int) -> None: ...

    def close(self) -> None: ...


class NoSnapshots:
    restored = None

    def ready(self) -> bool:
        return False

    def before_step(self) -> None:
        pass

    def after_step(self, step: int, capture: bool) -> None:
        pass

    def final(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Agreed:
    """One answer for all ranks to three questions about a step. Made by :func:`agree`.

    Attributes:
        loss_sum: the seed losses of the step, summed over all ranks.
        capture: every rank has a free slot, so all take a snapshot of this step.
        stop: a rank was asked to stop, so all stop after this step.
        wait_s: how long this rank waited for slower ones; the only value that differs between ranks.
    """

    loss_sum: float
    capture: bool
    stop: bool
    wait_s: float


def agree(group: Any, loss_sum: float, ready: bool, stop: bool) -> Agreed:
    """Sum the losses and join the answers of all ranks, by one small all-reduce. Collective."""
    if group is None:
        return Agreed(loss_sum, ready, stop, 0.0)
    begin = time.perf_counter()
    board.mark(Phase.AGREEMENT)
    vector = torch.tensor([loss_sum, not ready, stop], dtype=torch.float64)
    dist.all_reduce(vector, group=group)
    total, unready, stops = vector.tolist()
    board.mark(Phase.REDUCTION)
    return Agreed(total, unready == 0, stops > 0, time.perf_counter() - begin)


# What the worker agent sees on the board while a span runs, and until the next one begins.
ON_BOARD = {
    "input": Phase.SAMPLING,
    "forward": Phase.FORWARD,
    "backward": Phase.BACKWARD,
    "update": Phase.STEP,
    "report": Phase.WRITING,
    "snapshot": Phase.CAPTURE,
    "checkpoint": Phase.WRITING,
}


@dataclass
class Phases:
    """Seconds of one optimizer step on one rank.

    ``input`` is waiting for the prefetcher, of which ``exposed`` moved halo rows and ``input_others`` waited for slower
    ranks; ``others`` is waiting for slower ranks before the reduction; ``reduce`` is what DeepSpeed's collectives took
    (within ``backward`` and ``update``); ``report`` is losses.csv and the line on the screen.

    On a GPU these are the host's seconds: what it has queued there it waits for at the next number it reads, so much of
    ``backward`` and ``update`` is found in the ``input`` and ``forward`` of the next step. ``reduce`` is the GPU's.

    ``cpu`` are seconds of CPU time: of the training thread by phase, ``sample`` and ``fetch`` of the thread that made the
    batches, and ``process`` of all threads. Where they share a core, they tell whose time a phase was.
    """

    input: float = 0.0
    exposed: float = 0.0
    input_others: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    others: float = 0.0
    reduce: float = 0.0
    update: float = 0.0
    report: float = 0.0
    snapshot: float = 0.0
    cpu: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))

    def total(self) -> float:
        return self.input + self.forward + self.backward + self.others + self.update + self.report + self.snapshot

    @contextmanager
    def span(self, phase: str, shown: str = "") -> Iterator[None]:
        """Add the seconds of the block to ``phase``, which the board shows, or ``shown`` in its place."""
        board.mark(ON_BOARD[shown or phase])
        begin, cpu = time.perf_counter(), time.thread_time()
        yield
        setattr(self, phase, getattr(self, phase) + time.perf_counter() - begin)
        self.cpu[phase] += time.thread_time() - cpu

    def next_of(self, batches: Iterator[MicroBatch]) -> MicroBatch:
        """The next batch. Communication and slower ranks have the share in waiting for it that they had in making it."""
        before = self.input
        with self.span("input"):
            batch = next(batches)
        made_s = batch.sample_s + batch.fetch_s
        if made_s > 0:
            self.exposed += (self.input - before) * batch.transfer_s / made_s
            self.input_others += (self.input - before) * batch.meet_s / made_s
        self.cpu["sample"] += batch.sample_cpu_s
        self.cpu["fetch"] += batch.fetch_cpu_s
        return batch


def summed_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over seeds, or binary cross-entropy averaged over classes and summed over seeds."""
    logits = logits.float()
    if y.dim() == 1:
        return F.cross_entropy(logits, y, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / y.shape[1]


@dataclass
class Run:
    """Everything one rank trains with; made by :func:`build_run`, used by :func:`train`."""

    config: Config
    groups: Groups
    graph: PartitionedGraph
    source: BatchSource
    model: torch.nn.Module
    engine: Any
    evaluation: Evaluation
    report: Report
    events: EventLog
    progress: Progress
    state: RunState = field(default_factory=RunState)
    snapshots: SnapshotHooks = field(default_factory=NoSnapshots)

    @property
    def total_steps(self) -> int:
        return self.config.training.epochs * self.source.steps_per_epoch


def build_run(
    config: Config, graph: PartitionedGraph, groups: Groups, report: Report, events: EventLog, terminal: bool
) -> Run:
    """Build source, model, engine and evaluation for this rank. Collective."""
    source = BatchSource(graph, config, groups)
    model = build_model(config.model, graph.x.shape[1], graph.num_classes, config.seed)
    source.dense = needs_dense(model, groups.device)
    if config.training.precision == "bf16_products":
        model.multiply_in_bf16()  # type: ignore[operator]  # one of ours: validate() has seen to it
    engine = deepspeed_engine.build_engine(
        model.to(groups.device), config, config.training.epochs * source.steps_per_epoch
    )
    # Evaluation has a float32 model of its own: the engine's may be partitioned (ZeRO-3) or bf16. It measures the
    # weights that are kept, as whoever loads them uses them: in float32, whatever they were trained with.
    copy = build_model(config.model, graph.x.shape[1], graph.num_classes, config.seed).to(groups.device)
    exact = not config.evaluation.fanouts and hasattr(copy, "layers") and hasattr(copy, "layer")
    fanouts = [-1] if exact else config.evaluation.fanouts or [-1] * config.model.layers
    exchange = make_exchange(graph, config, groups, groups.evaluation)
    evaluation = Evaluation(
        NeighborSampler(source.in_edges_over(exchange), fanouts, config.seed, config.sampling.weighted and not exact),
        exchange,
        source.x,
        source.part.begin,
        source.part.end,
        int(np.diff(graph.bounds).max()),
        config.evaluation.batch_size,
        groups.device,
        exact,
    )
    progress = Progress(
        config.logger.progress and groups.rank == 0, config.training.epochs, source.steps_per_epoch, terminal
    )
    return Run(config, groups, graph, source, copy, engine, evaluation, report, events, progress)


def train(run: Run) -> RunState:
    """Train from ``run.state`` to the end, to an early stop, or to an agreed stop (``state.step`` says which)."""
    config, state, source = run.config, run.state, run.source
    clock = deepspeed_engine.CollectiveClock(run.groups.device)
    depth = config.sampling.prefetch
    keys = itertools.chain.from_iterable(map(source.step_keys, range(state.step, run.total_steps)))
    prepare, complete = source.stages(run.groups.backend)
    # Leaving the block early, all ranks after the same step, the prefetcher first prepares the batches it may already have
    # begun: an exchange that only some ranks take part in would hang them.
    with prefetch(
        prepare, keys, depth, complete=complete, close_timeout_s=config.distributed.timeout_s + 30
    ) as batches:
        # A resume within an epoch sees only a part of it, which is not the time of an epoch.
        epoch_begin = time.perf_counter() if state.step % source.steps_per_epoch == 0 else None
        while True:
            epoch = evaluation_due(state, source.steps_per_epoch, config.evaluation.every, config.training.epochs)
            if epoch:
                _evaluate(run, epoch)
                epoch_begin = time.perf_counter()
            if state.stopped or state.step >= run.total_steps:
                break
            agreed, phases, edges = _one_step(run, batches, clock)
            run.events.emit(
                "step",
                step=state.step,
                edges=edges,
                captured=agreed.capture,
                phases_s={k: round(v, 6) for k, v in vars(phases).items() if k != "cpu"},
                cpu_s={k: round(v, 6) for k, v in phases.cpu.items()},
            )
            run.report.step(phases, edges)
            if state.step % source.steps_per_epoch == 0:
                if epoch_begin is not None:
                    run.report.epoch(time.perf_counter() - epoch_begin)
                epoch_begin = time.perf_counter()
            if agreed.stop and state.step < run.total_steps:  # after the last step only its evaluation is left
                break
        board.mark(Phase.WRITING)  # from here on to the end of this trainer
    if not state.stopped and state.step < run.total_steps:
        run.snapshots.final(state.step)  # an orderly stop loses no step, whatever snapshot.every says
    run.snapshots.close()
    return state


def _one_step(
    run: Run, batches: Iterator[MicroBatch], clock: deepspeed_engine.CollectiveClock
) -> tuple[Agreed, Phases, int]:
    """One optimizer step: ``accumulation`` micro-batches, agreement, reduction, update. Also returns its edges."""
    config, state, source, engine = run.config, run.state, run.source, run.engine
    board.mark(Phase.SAMPLING, state.step + 1)
    phases, edges, loss_sum, reduce_before = Phases(), 0, 0.0, clock.seconds
    process_cpu = time.process_time()
    seeds = source.seeds_in_step(state.step)
    # DeepSpeed divides by ranks and by micro-batches; the loss is the mean over all seeds of the step.
    scale = run.groups.world_size * config.training.accumulation / seeds

    for micro in range(config.training.accumulation):
        batch = phases.next_of(batches)
        edges += batch.edges
        with phases.span("forward"):
            # Dropout is a function of the step and the rank, not of what was drawn before: a resume replays it.
            torch.manual_seed(int(stream(DROPOUT, config.seed, state.step, micro, run.groups.rank)) >> 1)
            loss = summed_loss(engine(batch.x, batch.blocks), batch.y)
            loss_sum += float(loss.detach())
        if micro < config.training.accumulation - 1:
            with phases.span("backward"):
                engine.backward(loss * scale)
                engine.step()  # updates nothing yet: DeepSpeed counts the micro-batch
    with phases.span("backward"):
        # ready() is asked as late as may be: the copy of the step before has had forward and backward to finish.
        agreed = deepspeed_engine.backward(
            engine,
            loss * scale,
            before_reduction=lambda: agree(run.groups.control, loss_sum, run.snapshots.ready(), stop_requested()),
        )
    phases.backward -= agreed.wait_s
    phases.others = agreed.wait_s
    with phases.span("snapshot"):
        # The window in which a background copy may read weights and moments ends with the update.
        run.snapshots.before_step()
    with phases.span("update"):
        engine.step()
    phases.reduce = clock.seconds - reduce_before
    state.step += 1
    loss_mean = agreed.loss_sum / seeds
    if not np.isfinite(loss_mean):
        raise FloatingPointError(
            f"the loss of step {state.step} is {loss_mean}; lower optimizer.lr, or normalise features "
            "(dataset.normalize=l2)"
        )
    board.milestone(Milestone.STEPPED)
    with phases.span("report"):
        run.report.loss(state, (state.step - 1) // source.steps_per_epoch + 1, loss_mean)
        run.progress.step(state.step, loss_mean)
    with phases.span("snapshot", "checkpoint" if config.snapshot.mode == "nfs" else "snapshot"):
        run.snapshots.after_step(state.step, agreed.capture)
    phases.cpu["process"] = time.process_time() - process_cpu
    return agreed, phases, edges


def _evaluate(run: Run, epoch: int) -> None:
    """Metrics of validation and test nodes over all ranks; the best model is written by rank 0."""
    begin = time.perf_counter()
    board.mark(Phase.EVALUATION)
    weights = deepspeed_engine.full_weights(run.engine)
    run.model.load_state_dict(weights)
    logits = run.evaluation.logits(run.model).numpy()
    part = run.source.part
    total = torch.from_numpy(
        np.stack([metrics.counts(logits[mask], part.y[mask]) for mask in (part.val_mask, part.test_mask)])
    )
    if run.groups.control is not None:
        dist.all_reduce(total, group=run.groups.control)
    val, test = (metrics.from_counts(c) for c in total.numpy())
    best = record_evaluation(run.state, epoch, val, test, run.config.training.metric)
    patience = run.config.training.patience
    run.state.stopped = patience > 0 and run.state.worse >= patience
    board.mark(Phase.WRITING)
    run.report.evaluation(epoch, val, test, weights if best else None)
    run.events.emit("evaluation", epoch=epoch, seconds=time.perf_counter() - begin, val=val, test=test)
    losses, seconds = run.report.recent_loss(), run.report.last_epoch_s()
    took = "-" if math.isnan(seconds) else f"{seconds:.2f} s"  # a run that went on within an epoch cannot say
    run.progress.line(
        f"epoch {epoch:>3}/{run.config.training.epochs}  loss {losses:.4f}  val {val['accuracy']:.4f}  "
        f"test {test['accuracy']:.4f}  {took}{'  *' if best else ''}"
    )
