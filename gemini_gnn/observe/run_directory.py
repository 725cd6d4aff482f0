"""The run directory: the record of a run, readable without the terminal.

    config.yaml              resolved settings
    status.json              the job now, or its end (status.py)
    losses.csv               step, epoch, loss: each step once, also after a resume
    metrics.jsonl            one line per evaluation
    losses.1.csv ...         RESULTS and config.yaml of earlier runs, numbered; resume=never started this one over
    failures.jsonl           what each failure cost (failures.py)
    result.json              written when the run is complete
    model.safetensors        best weights by validation; model.json says how to build the model
    events/rank-<r>.jsonl    phase times and events of each rank
    logs/rank-<r>.log        output of each rank
    errors/rank-<r>.json     the error a rank ended with
    faults/                  those that were committed on purpose, a file each
    terms/ checkpoints/ tensorboard/

Rank 0 and the worker agent write here; of the files above, the agent writes terms/ (terms.py), status.json (status.py) and
failures.jsonl (failures.py), which it also puts into result.json. Rank 0 writes while its worker agent holds the newest
term. Without an agent rank 0 claims a term itself. The per-rank files belong to their ranks.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import Config, from_mapping, seats_of, to_mapping
from gemini_gnn.errors import RunDirError
from gemini_gnn.faults import injection
from gemini_gnn.files import read_record, rename, write_atomically
from gemini_gnn.observe.failures import FAILURES
from gemini_gnn.observe.progress import say
from gemini_gnn.observe.status import write_status
from gemini_gnn.observe.terms import OVER, Beats, claim_term, make_run_dir, newest_holder

# Settings that may change between two starts of one run: none of them changes the losses of its steps. snapshot.mode may
# not change: one mode does not find what another has kept.
FREE_SETTINGS: tuple[str, ...] = (
    "run_dir",
    "resume",
    # Only shown or kept:
    "logger",
    "snapshot.every",
    "snapshot.mtbf_s",
    "snapshot.replicas",
    "snapshot.failure_domains",
    "snapshot.replicate_every_s",
    "snapshot.replica_bytes_per_s",
    "snapshot.interleave",
    "snapshot.persist_every",
    "snapshot.persist_keep",
    "snapshot.nfs_every",
    "snapshot.folder",
    "snapshot.arena",
    "partition.plot",
    # How ranks meet, wait and check (another backend may sum in another order, which changes last bits):
    "distributed",
    "recovery",
    "faults",  # a job that has survived them is the job without them, bit for bit
    "partition.timeout_s",
    "partition.verify",
    # Where files lie; their contents are in the fingerprint of the graph:
    "dataset.root",
    "dataset.cache",
    # Evaluation reads the weights into a model of its own and draws from no generator of the training. It chooses the
    # best epoch and, with training.patience, the last one, but no update of the weights.
    "evaluation",
    # How a batch is made, not which: its edges, their order and its features are the same, bit for bit.
    "sampling.topology",
    "sampling.prefetch",
    "sampling.chunk_bytes",
    "features.in_ram",
    "features.shared",
)

RESULTS = ("metrics.jsonl", "model.safetensors", "model.json", "losses.csv")  # the files of a run besides its settings


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """``setting: old -> new`` for every setting that makes a run another run. Pure."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{path}{key}"
        if name in FREE_SETTINGS:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, name + ".")
        elif a != b:
            found.append(f"{name}: {a} -> {b}")
    return found


class RunDir:
    """A run directory that this process has claimed."""

    def __init__(self, path: Path, beats: Beats | None):
        self.path = path
        self._beats = beats  # None: an agent holds the folder

    @classmethod
    def claim(cls, config: Config, anew: bool = False, held: bool = False) -> RunDir:
        """Take the folder for this run, or raise and leave the files of the run in it as they are.

        Args:
            anew: this start begins at step 0 (``resume=never``): the files of the run before are kept under other names.
            held: by the worker agent that started this process.

        Raises:
            RunDirError: unwritable, in use by a living job, or holding a finished or a different run.
        """
        path = Path(config.run_dir).absolute()
        make_run_dir(path)
        owner = f"pid {os.getpid()} on {os.uname().nodename} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        run = cls(path, None if held else Beats(path, claim_term(path, {"owner": owner}, say=say)))
        try:
            cls.check_earlier_run(path, config)
        except RunDirError:
            run.release()
            raise
        if anew:
            keep_earlier(path, (*RESULTS, FAILURES, "config.yaml", injection.FOLDER))
        if not _has_settings(path, config):
            write_atomically(path / "config.yaml", _to_yaml(config))
        for folder in ("errors", "checkpoints"):
            (path / folder).mkdir(exist_ok=True)
        return run

    @staticmethod
    def check_earlier_run(path: Path, config: Config) -> None:
        """Raise if this run may not resume in ``path``. Changes nothing, and does not look for a living job there.

        Raises:
            RunDirError: it holds a finished run, or one with other settings that has done a step.
        """
        if (path / "result.json").exists():
            raise RunDirError(
                f"run_dir {path} holds a finished run (result.json); give another run_dir=..., look at this one with "
                f"`python launch/evaluate.py run_dir={path}`, or remove the folder to train again"
            )
        if config.resume != "never":
            changed = changed_settings(path, config)
            if changed and (config.resume == "must" or steps_done(path)):
                raise RunDirError(
                    f"run_dir {path} holds a run with other settings ({'; '.join(changed[:5])}); "
                    "give another run_dir=..., the same settings, or resume=never to start it over"
                )

    def status(self, state: str, **fields: Any) -> None:
        """Where an agent holds the folder, it writes the status."""
        if self._beats is not None:
            self.expect_ours()
            write_status(self.path, state, **fields)

    def finish(self, result: dict[str, Any]) -> None:
        self.expect_ours()
        write_atomically(self.path / "result.json", json.dumps(result, indent=1))
        self.status("done")

    def expect_ours(self) -> None:
        """
        Raises:
            RunDirError: another start took the folder while this process looked dead: this one may not write any more.
        """
        if self._beats is not None and self._beats.lost:
            raise RunDirError(
                f"run_dir {self.path} was taken by another start while this process did not run or could not write there; "
                "end one of the two, or give another run_dir=..."
            )

    def release(self) -> None:
        if self._beats is not None:
            self._beats.stop()
            self._beats = None


def changed_settings(path: Path, config: Config) -> list[str]:
    """``setting: old -> new`` against the run in ``path``; empty where there is none."""
    if not (path / "config.yaml").exists() or _has_settings(path, config):
        return []
    return differences(to_mapping(read_config(path)), to_mapping(config))


def check_size(config: Config, place: Place) -> None:
    """Raise if a run that did steps would go on with another number of ranks: each trains a part of the graph.

    Where a job may still live, its agent has the word: that it runs is the better news.

    Raises:
        RunDirError: how many ranks the run has, how many this launch, and what to type.
    """
    path, slots, seats = Path(config.run_dir), place.local_world_size, seats_of(config.recovery, place.machines)
    ranks, standbys = _ranks_of(path, seats * slots), place.machines - seats
    if config.resume == "never" or ranks == seats * slots or not steps_done(path):
        return
    term, beat, lives = newest_holder(path)
    if term and beat != OVER and lives is not False:
        return
    each = max(n for n in range(1, slots + 1) if ranks % n == 0)
    nodes = ranks // each + standbys
    again = {
        "slurm": f"--nodes={nodes} --ntasks-per-node={each}",
        "torchrun": f"--nnodes={nodes} --nproc-per-node={each}",
    }.get(place.launcher, f"{nodes} hosts with slots={each} in the hostfile")
    if nodes == 1 and place.launcher in ("deepspeed", "plain"):
        again = f"deepspeed --num_accelerators {each}"
    raise RunDirError(
        f"run_dir {path}: expected {ranks} ranks, as the run in it has, each for a part of the graph; got {seats * slots}, "
        f"{slots} on each of {_count(seats)} that train{'s' * (seats == 1)}. Start on {_count(nodes)}"
        f"{f' ({standbys} of them standing by)' * (standbys > 0)} with {each} each ({again}), give another run_dir=..., "
        "or resume=never to start it over"
    )


def _count(machines: int) -> str:
    return f"{machines} machine{'s' * (machines != 1)}"


def _ranks_of(path: Path, unknown: int) -> int:
    """Of the run in ``path``; ``unknown`` where it did not say: it is new, or of an older version."""
    return int(read_record(path / "model.json").get("ranks", unknown))


def steps_done(path: Path) -> int:
    """The last step in ``losses.csv``; 0: the run failed at the start, and its settings may be mended."""
    if not (path / "losses.csv").exists():
        return 0
    with open(path / "losses.csv", "rb") as file:  # its end only: recoveries ask too
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        last = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2].partition(b",")[0]
    return int(last) if last.isdigit() else 0  # else the header


def keep_earlier(path: Path, names: Sequence[str] = RESULTS) -> None:
    """Before a run begins again at step 0: give the files of one that did a step the first number free for all of them."""
    if not steps_done(path):
        return
    for number in itertools.count(1):
        kept = [path / f"{Path(name).stem}.{number}{Path(name).suffix}" for name in names]
        if not any(file.exists() for file in kept):
            break
    for name, file in zip(names, kept, strict=True):
        if (path / name).exists():
            rename(path / name, file)


def resume_of(config: Config, ranks: int) -> str:
    """``config.resume``; "never" where the settings or the ranks of a run that has not done a step were changed: a snapshot
    taken before its first step is of those before."""
    path = Path(config.run_dir)
    other = changed_settings(path, config) or _ranks_of(path, ranks) != ranks
    return "never" if config.resume == "auto" and other and not steps_done(path) else config.resume


def read_config(path: Path) -> Config:
    """The settings of the run in ``path``.

    Raises:
        RunDirError: there is no readable config.yaml.
    """
    from omegaconf import OmegaConf

    file = Path(path) / "config.yaml"
    if not file.is_file():
        raise RunDirError(f"{path} is not a run directory: expected config.yaml in it; give the run_dir of a training")
    return from_mapping(OmegaConf.load(file))


def _has_settings(path: Path, config: Config) -> bool:
    """Whether ``config.yaml`` says just this: reading YAML takes 30 ms, a tenth of a recovery; writing it takes 1."""
    try:
        return (path / "config.yaml").read_text() == _to_yaml(config)
    except FileNotFoundError:
        return False


def _to_yaml(config: Config) -> str:
    """As OmegaConf would write it, in C: 1 ms rather than 9, and a recovery asks twice."""
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
        def represent_text(self, text: str) -> Any:
            return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if _is_number(text) else None)

    Dumper.add_representer(str, Dumper.represent_text)
    return yaml.dump(to_mapping(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _is_number(text: str) -> bool:
    """OmegaConf reads ``1e5`` as a number; YAML 1.1, and so its writer, takes it for text that needs no quotes."""
    try:
        float(text)
    except ValueError:
        return False
    return True


class LossLog:
    """``losses.csv``: step, epoch, global mean loss with all its digits; each step once, also after a resume.

    A row is written at once, without a buffer of this process: a kill loses none. The kernel's cache can be lost with
    the machine, so rows not yet synced are part of the snapshot (:attr:`unsynced`) and are put back by :meth:`resume`.
    A thread syncs, so that a slow file system does not stop training.
    """

    HEADER = "step,epoch,loss\n"
    SYNC_S = 1.0

    def __init__(self, path: Path):
        self.path = path
        self.unsynced: list[list[float]] = []
        self._file: int | None = None
        self._synced = time.monotonic()
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="losses")
        self._syncing: Future[None] | None = None
        self._covers = 0

    def resume(self, step: int, rows: list[list[float]]) -> None:
        """Put a new file in the place of the old one: its rows up to ``step``, and those of ``rows`` that it lost.

        A rank 0 of another membership may still have the old file open, on a machine that was cut off: what it appends
        goes nowhere. The thread syncs the new file at once, so that a recovery does not wait for the disk.
        """
        kept: dict[int, tuple[int, float]] = {}
        if step > 0 and self.path.exists():
            for row in read_losses(self.path):
                if row[0] <= step:
                    kept[row[0]] = (row[1], row[2])
        for s, epoch, loss in rows:
            if s <= step:
                kept[int(s)] = (int(epoch), loss)
        text = self.HEADER + "".join(f"{s},{e},{v!r}\n" for s, (e, v) in sorted(kept.items()))
        write_atomically(self.path, text, durable=False)
        self.unsynced = [row for row in rows if row[0] <= step]
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._sync(step)

    def append(self, step: int, epoch: int, loss: float) -> None:
        """Add a row.

        Raises:
            OSError: of the write, or of an earlier sync.
        """
        assert self._file is not None, "resume() opens the file"
        os.write(self._file, f"{step},{epoch},{loss!r}\n".encode())
        self.unsynced.append([step, epoch, loss])
        if self._syncing is not None and self._syncing.done():
            self._syncing.result()
            self.unsynced = [row for row in self.unsynced if row[0] > self._covers]
            self._syncing = None
        if self._syncing is None and time.monotonic() - self._synced > self.SYNC_S:
            self._sync(step)

    def _sync(self, step: int) -> None:
        assert self._file is not None
        self._covers, self._synced = step, time.monotonic()
        self._syncing = self._syncer.submit(os.fsync, self._file)

    def close(self) -> None:
        self._syncer.shutdown(wait=True)
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None


def read_losses(path: Path) -> list[tuple[int, int, float]]:
    """Rows ``(step, epoch, loss)``; a last line torn by a kill is left out."""
    rows = []
    with open(path, newline="") as file:
        text = file.read()
    complete = text[: text.rfind("\n") + 1]
    for row in csv.reader(complete.splitlines()[1:]):
        rows.append((int(row[0]), int(row[1]), float(row[2])))
    return rows
