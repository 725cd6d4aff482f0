"""The training loop of one rank.

Who owns what: the training thread owns model, engine, the world and evaluation groups; the prefetcher's thread owns the
sampler, the feature store and the halo group. Every rank makes the same sequence of collectives: the number of
batches, the decision to stop and the decision to capture are pure functions or agreed values, never private ones. The
agreement is one small all-reduce per step between backward and gradient reduction (:class:`Status`); a rank that dies
makes it raise on the others.

What may be interrupted: a step that has not reached its end leaves no trace but lines in event logs; losses.csv is
appended after the step and trimmed on resume.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from gemini_gnn.config import Config
from gemini_gnn.faults import Fault, maybe_fail
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.hashing import DROPOUT, stream
from gemini_gnn.models.build import build_model
from gemini_gnn.observe.events import EventLog
from gemini_gnn.observe.progress import Progress
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


class Snapshots(Protocol):
    """What the loop asks of snapshots; ``snapshot.attach`` and the NFS baseline answer."""

    def ready(self) -> bool: ...

    def before_step(self) -> None: ...

    def after_step(self, step: int, capture: bool) -> None: ...

    def final(self, step: int) -> None: ...

    def close(self) -> None: ...


class NoSnapshots:
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


@dataclass
class Status:
    """What all ranks agree on once per step, by one all-reduce of three numbers that runs anyway.

    Attributes:
        loss_sum: in: this rank's summed seed losses; out: everybody's.
        unready: in: 1 if this rank cannot take a snapshot now; out: how many cannot.
        stop: in: 1 if this rank was asked to stop; out: how many were.
        wait_s: how long this rank waited in it, that is for slower ranks.
    """

    group: Any
    loss_sum: float = 0.0
    unready: int = 0
    stop: int = 0
    wait_s: float = 0.0

    def agree(self) -> None:
        if self.group is None:
            self.wait_s = 0.0
            return
        begin = time.perf_counter()
        vector = torch.tensor([self.loss_sum, self.unready, self.stop], dtype=torch.float64)
        dist.all_reduce(vector, group=self.group)
        self.loss_sum, self.unready, self.stop = float(vector[0]), int(vector[1]), int(vector[2])
        self.wait_s = time.perf_counter() - begin


@dataclass
class Phases:
    """Seconds of one optimizer step on one rank.

    ``input`` is waiting for the prefetcher, of which ``exposed`` moved halo rows and ``input_others`` waited for slower
    ranks; ``others`` is waiting for slower ranks before the reduction; ``reduce`` is what DeepSpeed's collectives took
    (within ``backward`` and ``update``).

    On a GPU these are the host's seconds: what it has queued there it waits for at the next number it reads, so much of
    ``backward`` and ``update`` is found in the ``input`` and ``forward`` of the next step. ``reduce`` is the GPU's.
    """

    input: float = 0.0
    exposed: float = 0.0
    input_others: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    others: float = 0.0
    reduce: float = 0.0
    update: float = 0.0
    snapshot: float = 0.0

    def total(self) -> float:
        return self.input + self.forward + self.backward + self.others + self.update + self.snapshot


def summed_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over seeds, or binary cross-entropy averaged over classes and summed over seeds."""
    logits = logits.float()
    if y.dim() == 1:
        return F.cross_entropy(logits, y, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / y.shape[1]


@dataclass
class Run:
    """Everything one rank trains with; made by :func:`prepare`, used by :func:`train`."""

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
    faults: list[Fault] = field(default_factory=list)
    recoveries: int = 0  # memberships of this job before this one, within the term: faults count them
    state: RunState = field(default_factory=RunState)
    snapshots: Snapshots = field(default_factory=NoSnapshots)

    @property
    def total_steps(self) -> int:
        return self.config.training.epochs * self.source.steps_per_epoch


def prepare(
    config: Config, graph: PartitionedGraph, groups: Groups, report: Report, events: EventLog, terminal: bool
) -> Run:
    """Build source, model, engine and evaluation for this rank. Collective."""
    source = BatchSource(graph, config, groups)
    model = build_model(config.model, graph.x.shape[1], graph.num_classes, config.seed)
    engine = deepspeed_engine.build_engine(
        model.to(groups.device), config, config.training.epochs * source.steps_per_epoch
    )
    # Evaluation has a float32 model of its own: the engine's may be partitioned (ZeRO-3) or bf16.
    copy = build_model(config.model, graph.x.shape[1], graph.num_classes, config.seed).to(groups.device)
    exact = not config.evaluation.fanouts and hasattr(copy, "layers") and hasattr(copy, "layer")
    fanouts = [-1] if exact else config.evaluation.fanouts or [-1] * config.model.layers
    exchange = make_exchange(graph, config, groups, groups.evaluation)
    evaluation = Evaluation(
        NeighborSampler(source.in_edges_over(exchange), fanouts, config.seed, config.sampling.weighted and not exact),
        exchange,
        source.part.x,
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
    config, state, source, engine = run.config, run.state, run.source, run.engine
    status = Status(run.groups.control)

    def agree() -> None:
        # Asked as late as may be: the copy of the step before has had this step's forward and backward to finish.
        status.unready = int(not run.snapshots.ready())
        status.agree()

    deepspeed_engine.on_reduce(engine, agree)
    clock = deepspeed_engine.CollectiveClock(run.groups.device)
    depth = config.sampling.prefetch
    keys = itertools.chain.from_iterable(map(source.step_keys, range(state.step, run.total_steps)))
    make, finish = source.stages(run.groups.backend)
    # Leaving the block early, all ranks after the same step, the prefetcher first makes the batches it may already have
    # begun: an exchange that only some ranks take part in would hang them.
    with prefetch(make, keys, depth, finish=finish, close_timeout_s=config.distributed.timeout_s + 30) as batches:
        # A resume within an epoch sees only a part of it, which is not the time of an epoch.
        epoch_begin = time.perf_counter() if state.step % source.steps_per_epoch == 0 else None
        while True:
            epoch = evaluation_due(state, source.steps_per_epoch, config.evaluation.every, config.training.epochs)
            if epoch:
                _evaluate(run, epoch)
                epoch_begin = time.perf_counter()
            if state.stopped or state.step >= run.total_steps:
                break
            phases, edges = _one_step(run, batches, status, clock)
            run.events.emit(
                "step", step=state.step, edges=edges, phases_s={k: round(v, 6) for k, v in vars(phases).items()}
            )
            run.report.step(phases, edges)
            if state.step % source.steps_per_epoch == 0:
                if epoch_begin is not None:
                    run.report.epoch(time.perf_counter() - epoch_begin)
                epoch_begin = time.perf_counter()
            if status.stop and state.step < run.total_steps:  # after the last step only its evaluation is left
                break
    if not state.stopped and state.step < run.total_steps:
        run.snapshots.final(state.step)  # an orderly stop loses no step, whatever snapshot.every says
    run.snapshots.close()
    return state


def _one_step(run: Run, batches: Iterator[MicroBatch], status: Status, clock: Any):
    """One optimizer step: ``accumulation`` micro-batches, agreement, reduction, update. Returns phases and edges."""
    config, state, source, engine = run.config, run.state, run.source, run.engine
    phases, edges, mark = Phases(), 0, time.perf_counter()
    maybe_fail(run.faults, run.groups.rank, state.step, run.recoveries)
    status.loss_sum, status.stop = 0.0, int(stop_requested())
    seeds = source.seeds_in_step(state.step)
    # DeepSpeed divides by ranks and by micro-batches; the loss is the mean over all seeds of the step.
    scale = run.groups.world_size * config.training.accumulation / seeds
    reduce_before = clock.seconds
    for micro in range(config.training.accumulation):
        batch = next(batches)
        now = time.perf_counter()
        phases.input += now - mark
        made_s = batch.sample_s + batch.fetch_s
        # Of the time spent waiting for the batch, communication and slower ranks have the share they had in making it.
        phases.exposed += (now - mark) * (batch.transfer_s / made_s if made_s > 0 else 0.0)
        phases.input_others += (now - mark) * (batch.meet_s / made_s if made_s > 0 else 0.0)
        mark = now
        edges += batch.edges
        # Dropout is a function of the step and the rank, not of what was drawn before: a resume replays it.
        torch.manual_seed(int(stream(DROPOUT, config.seed, state.step, micro, run.groups.rank)) >> 1)
        loss = summed_loss(engine(batch.x, batch.blocks), batch.y)
        status.loss_sum += float(loss.detach())
        now = time.perf_counter()
        phases.forward += now - mark
        mark = now
        engine.backward(loss * scale)
        last = micro == config.training.accumulation - 1
        if last:
            # The window in which a background copy may read weights and moments ends with the update.
            phases.backward += time.perf_counter() - mark - status.wait_s
            phases.others = status.wait_s
            mark = time.perf_counter()
            run.snapshots.before_step()
            phases.snapshot += time.perf_counter() - mark
            mark = time.perf_counter()
        engine.step()
        now = time.perf_counter()
        if last:
            phases.update += now - mark
        else:
            phases.backward += now - mark
        mark = now
    phases.reduce = clock.seconds - reduce_before
    state.step += 1
    loss_mean = status.loss_sum / seeds
    if not np.isfinite(loss_mean):
        raise FloatingPointError(
            f"the loss of step {state.step} is {loss_mean}; lower optimizer.lr, or normalise features "
            "(dataset.normalize=l2)"
        )
    epoch = (state.step - 1) // source.steps_per_epoch + 1
    run.report.loss(state, epoch, loss_mean)
    run.progress.step(state.step, loss_mean)
    run.snapshots.after_step(state.step, capture=status.unready == 0)
    phases.snapshot += time.perf_counter() - mark
    return phases, edges


def _evaluate(run: Run, epoch: int) -> None:
    """Metrics of validation and test nodes over all ranks; the best model is written by rank 0."""
    begin = time.perf_counter()
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
    run.report.evaluation(epoch, val, test, weights if best else None)
    run.events.emit("evaluation", epoch=epoch, seconds=time.perf_counter() - begin, val=val, test=test)
    losses, seconds = run.report.recent_loss(), run.report.last_epoch_s()
    took = "-" if math.isnan(seconds) else f"{seconds:.2f} s"  # a run that went on within an epoch cannot say
    run.progress.line(
        f"epoch {epoch:>3}/{run.config.training.epochs}  loss {losses:.4f}  val {val['accuracy']:.4f}  "
        f"test {test['accuracy']:.4f}  {took}{'  *' if best else ''}"
    )
