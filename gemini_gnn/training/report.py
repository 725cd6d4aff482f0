"""The results of a run: losses.csv, metrics.jsonl, TensorBoard, W&B, the best model and result.json. Rank 0 writes.

Where machines share no run directory, the first rank of each machine writes them on its own disk. A machine that was not
there from the beginning gets what it lacks from another one (:meth:`Report.begin`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import statistics
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gemini_gnn.config import Config, to_mapping
from gemini_gnn.errors import ConfigError
from gemini_gnn.files import write_atomically
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.observe.progress import say
from gemini_gnn.observe.run_directory import LossLog, RunDir, read_losses
from gemini_gnn.training.groups import Groups
from gemini_gnn.training.state import RunState

PHASES = ("input", "exposed", "input_others", "forward", "backward", "others", "reduce", "update", "report", "snapshot")


class Report:
    """Collects on every rank, writes on rank 0 (``run_dir`` is None elsewhere). ``private``: on the first of each machine."""

    def __init__(self, run_dir: RunDir | None, config: Config, groups: Groups, private: bool = False):
        self.run_dir, self.config, self.groups, self.private = run_dir, config, groups, private
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.steps, self.edges, self.busy_s = 0, 0, 0.0
        self.epoch_s: list[float] = []
        self._loss = math.nan
        self._losses = LossLog(run_dir.path / "losses.csv") if run_dir else None
        self._metrics: Any = None
        self._board: Any = None
        self._wandb: Any = None

    def begin(self, state: RunState) -> None:
        """Bring the files to ``state``: rows beyond its step are dropped, rows lost with a machine are put back.

        Collective, where machines share no run directory.
        """
        if self.private:
            self._share_history(state)
        if self.run_dir is None or self._losses is None:
            return
        if self.config.logger.wandb and self.groups.rank == 0:
            self._wandb = _start_wandb(self.config)
        self._losses.resume(state.step, state.losses)
        if state.losses:
            self._loss = state.losses[-1][2]
        if self.config.logger.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run_dir.path / "tensorboard"), purge_step=state.step + 1)
        path = self.run_dir.path / "metrics.jsonl"
        rows = [row for row in _read_rows(path) if row["epoch"] <= state.evaluated]
        # A new file, as of the losses: another rank 0 may have the old one open.
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows), durable=False)
        self._metrics = open(path, "a")

    def _share_history(self, state: RunState) -> None:
        """The machine with most of the run's rows sends its files to those that have fewer: they came later, or were away."""
        group, own = self.groups.control, (-1, -1)  # of a rank that writes nothing
        if self.run_dir is not None:
            path = self.run_dir.path / "losses.csv"
            losses = {row[0] for row in read_losses(path) if row[0] <= state.step} if path.exists() else set[int]()
            metrics = [
                row for row in _read_rows(self.run_dir.path / "metrics.jsonl") if row["epoch"] <= state.evaluated
            ]
            own = len(losses), len(metrics)
        if group is None:
            return
        gathered = [torch.zeros(2, dtype=torch.int64) for _ in range(self.groups.world_size)]
        dist.all_gather(gathered, torch.tensor(own), group=group)
        held = [tuple(map(int, one)) for one in gathered]
        most = max(held)
        if all(one in (most, (-1, -1)) for one in held):
            return
        source = held.index(most)
        for name in ("losses.csv", "metrics.jsonl", "model.safetensors"):
            content = b""
            if self.groups.rank == source:
                assert self.run_dir is not None
                with contextlib.suppress(FileNotFoundError):  # before the first evaluation
                    content = (self.run_dir.path / name).read_bytes()
            length = torch.tensor([len(content)])
            dist.broadcast(length, source, group=group)
            data = torch.frombuffer(bytearray(content or bytes(int(length))), dtype=torch.uint8) if length else None
            if data is not None:
                dist.broadcast(data, source, group=group)
                if self.run_dir is not None and own < most:
                    write_atomically(self.run_dir.path / name, data.numpy().tobytes(), durable=False)
        if self.groups.rank == source:
            say("sent the results so far to the machines that lack them")

    def loss(self, state: RunState, epoch: int, loss: float) -> None:
        self._loss = loss
        if self.run_dir is not None and self._losses is not None:
            self.run_dir.expect_ours()
            self._losses.append(state.step, epoch, loss)
            state.losses = self._losses.unsynced
        if self._board is not None:
            self._board.add_scalar("loss", loss, state.step)

    def step(self, phases: Any, edges: int) -> None:
        for name in PHASES:
            self.phases[name] += getattr(phases, name)
        self.busy_s += phases.total()
        self.steps += 1
        self.edges += edges

    def epoch(self, seconds: float) -> None:
        self.epoch_s.append(seconds)

    def last_epoch_s(self) -> float:
        return self.epoch_s[-1] if self.epoch_s else math.nan

    def recent_loss(self) -> float:
        return self._loss

    def evaluation(self, epoch: int, val: dict[str, float], test: dict[str, float], best: Any) -> None:
        """Note an evaluation; ``best`` are the weights to keep, or None."""
        if self.run_dir is None:
            return
        row = {"epoch": epoch} | {f"val_{k}": v for k, v in val.items()} | {f"test_{k}": v for k, v in test.items()}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        for k, v in row.items():
            if self._board is not None and k != "epoch":
                self._board.add_scalar(k.replace("_", "/", 1), v, epoch)
        if self._wandb is not None:
            self._wandb.log(row | {"loss": self._loss})
        if best is not None:
            save_weights(best, self.run_dir.path / "model.safetensors")

    def result(self, state: RunState, extra: dict[str, Any], remote_bytes: int) -> dict[str, Any]:
        """The contents of result.json. Collective: times are of the slowest rank, bytes and edges of all.

        Times, edges, bytes and phases are those since ``measured_from_step``, the step this process began at.
        """
        sums = torch.tensor([float(self.edges), float(remote_bytes)], dtype=torch.float64)
        worst = torch.tensor(
            [statistics.median(self.epoch_s) if self.epoch_s else math.nan, float(_peak_rss_bytes()), self.busy_s]
            + [float(_peak_gpu_bytes(self.groups.device))]
            + [self.phases[name] for name in PHASES],
            dtype=torch.float64,
        )
        own_fraction = torch.tensor(
            [(self.phases["exposed"] + self.phases["reduce"]) / self.busy_s if self.busy_s else 0.0],
            dtype=torch.float64,
        )
        if self.groups.control is not None:
            dist.all_reduce(sums, group=self.groups.control)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.groups.control)
            dist.all_reduce(own_fraction, group=self.groups.control)
        best = state.best
        phases_s = dict(zip(PHASES, worst[4:].tolist(), strict=True))
        return {
            "test_accuracy": _number(best.get("test_accuracy")),
            "val_accuracy": _number(best.get("val_accuracy")),
            "macro_f1": _number(best.get("test_macro_f1")),
            "micro_f1": _number(best.get("test_micro_f1")),
            "best_epoch": best.get("epoch"),
            "epochs": state.evaluated,
            "steps": state.step,
            "early_stopped": state.stopped,
            "world_size": self.groups.world_size,
            "backend": self.groups.backend,
            "epoch_s": _number(worst[0]),
            "edges_per_s": float(sums[0] / worst[2]) if worst[2] > 0 else 0.0,
            "communication_fraction": float(own_fraction[0] / self.groups.world_size),
            "phases_s": phases_s,
            "steps_timed": self.steps,
            "remote_bytes": int(sums[1]),
            "peak_rss_bytes": int(worst[1]),
            "peak_gpu_bytes": int(worst[3]),
            "versions": versions(),
            **extra,
            "config": to_mapping(self.config),
        }

    def close(self) -> None:
        if self._losses is not None:
            self._losses.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(config: Config) -> Any:
    """A run of W&B.

    Raises:
        ConfigError: the package is not here, or nobody is logged in.
    """
    try:
        import wandb
    except ModuleNotFoundError:
        raise ConfigError(
            "logger.wandb=true: expected the package wandb, which is not installed; type `pip install wandb`, "
            "or leave logger.wandb out"
        ) from None
    try:
        return wandb.init(project=config.logger.wandb_project, dir=config.run_dir, config=to_mapping(config))
    except wandb.Error as error:
        raise ConfigError(
            f"logger.wandb=true: expected a run of W&B; got: {str(error).rstrip('.')}. Type `wandb login`, "
            "or `export WANDB_MODE=offline`, "
            "or leave logger.wandb out"
        ) from None


def save_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write weights as safetensors, whole or not at all."""
    from safetensors.torch import save

    # Not save_file: it makes files of mode 0600, but all readers of the run directory may read this one.
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in weights.items()}))


def versions() -> dict[str, str]:
    names = ("torch", "deepspeed", "torch-geometric", "numpy", "numba", "pymetis", "gemini-gnn")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def model_card(config: Config, graph: PartitionedGraph) -> dict[str, Any]:
    """The values that :func:`gemini_gnn.load` needs beside the weights; and for later starts, standbys and machines that join the
    graph and the number of ranks."""
    return {
        "model": asdict(config.model),
        "in_features": graph.x.shape[1],
        "num_classes": graph.num_classes,
        "multi_label": graph.multi_label,
        "ranks": graph.parts,
        "graph": graph.meta.fingerprint,
        "partition": os.fspath(graph.folder.absolute()),
    }


def _number(value: Any) -> float | None:
    """A JSON number; None for what was never measured."""
    return None if value is None or math.isnan(float(value)) else float(value)


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_gpu_bytes(device: torch.device) -> int:
    """Of tensors; what CUDA and NCCL hold for themselves is not counted. 0 without a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
