"""Copies of snapshots on other machines: their speed, what they cost a training, and what they hold.

    python benchmarks/replication.py                     (root on Linux: hosts on this machine, see docs/lab.md)
    python benchmarks/replication.py --quick             # small sizes
    python benchmarks/replication.py --part push

push        Two replicator processes on two hosts. From the bell until the peer has verified the copy, beside the same bytes
            from one mapping into another over a bare socket. Both hosts at once beside lm-resiliency's pairwise replication,
            where it is installed (pip install lm-resiliency==0.2.0): its time includes a memcpy of the state, ours a checksum.
            Links: 1 and 10 Gbit/s in the lab, and this machine's loopback.
restore     1 Gbit/s. A host that has lost its memory fetches the shards of one rank from a peer, then attach() restores a fresh
            engine. Beside DeepSpeed's load_checkpoint from the lab's network file system: one host alone, and all four at
            once, as after a failure of a job without snapshots in memory. The server has the same link as every host.
loss        Real jobs on 4 hosts, ZeRO-1, a snapshot after every step: replicas=1 beside replicas=2 with and without interleaving,
            in turns. The forward pass waits `--compute` seconds, as for a GPU; `--busy` computes meanwhile, on 2 cores for 4
            hosts. Per step also the CPU time of all replicators, how far the interval stretches, and the memory that slots
            take on h1 beside the formula.
compress    Snapshots of successive steps of launch/train.py: how much of them has changed, and how small zlib, lz4 and zstd
            (where installed) make them, and make what has changed (XOR, also with the bytes of floats in planes).

Everything is measured in turns within one run; ratios are of medians of that run, or medians of ratios within a round. All hosts
share this machine's cores: where links are faster than these, figures say what the cores can do.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import recovery
from common import cpu_of, in_turns, machine, median, pace, write

from gemini_gnn.recovery import home
from gemini_gnn.snapshot.store import arena, catalog, format
from gemini_gnn.snapshot.store.format import SlotState

ROOT = Path(__file__).resolve().parent.parent
LONGEST_S = 400.0  # of one request to a host
HOSTS = ["h0", "h1", "h2", "h3"]
LOOPBACK = "loopback"
WARM = 3  # rounds that are not counted: each slot's pages are new once
PAGES = (4096, 64 << 10)  # bytes of which "unchanged" is counted
TRAINER = (
    7  # times the bytes of a rank's state: weights, gradients and buffers of all 4 ranks' parameters, and the state
)
GAIN = 1.5  # how many times as fast a copy must arrive at 1 Gbit/s, for a core on both ends and a format of its own
VARIANTS = {
    "one copy": ("snapshot.replicas=1",),
    "two, interleaved": ("snapshot.replicas=2", "snapshot.interleave=true"),
    "two, at any time": ("snapshot.replicas=2", "snapshot.interleave=false"),
}


# --- what was measured: pure ------------------------------------------------------------------------------------------


def slots_bytes(shard_bytes: int, replicas: int) -> int:
    """Host memory on each machine of one rank, where no rank has anything in common: three own slots, two of each other."""
    return shard_bytes * (catalog.OWN_SLOTS + catalog.FOREIGN_SLOTS * (replicas - 1))


def unchanged(a: np.ndarray, b: np.ndarray, size: int) -> float:
    """The share of pieces of ``size`` bytes that are equal; the last piece may be shorter."""
    different = np.add.reduceat(a != b, np.arange(0, len(a), size), dtype=np.int64) > 0
    return float(1 - different.mean())


def planes(raw: np.ndarray) -> np.ndarray:
    """First the first bytes of all float32, then the second ones, ...; what is over stays behind them."""
    whole = len(raw) // 4 * 4
    return np.concatenate([np.ascontiguousarray(raw[:whole].reshape(-1, 4).T).reshape(-1), raw[whole:]])


def gain(ratio: float, compress_bytes_s: float, link_bytes_s: float) -> float:
    """How many times as fast a copy arrives, if one core compresses to ``ratio`` while the link carries what is done."""
    return min(compress_bytes_s, link_bytes_s / ratio) / link_bytes_s


# --- hosts ------------------------------------------------------------------------------------------------------------


class Remote:
    """A process of replication_host.py. ``peer``: name, address and port of its replicator."""

    def __init__(self, lab: Any, name: str, rank: int, log: Path):
        command = [sys.executable, str(ROOT / "benchmarks" / "replication_host.py"), str(rank)]
        self.name, self.address, self.log = name, lab.address(name) if lab else "127.0.0.1", log
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0" if lab else "lo", "DS_ACCELERATOR": "cpu"}
        with open(log, "ab") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "env": environment}
            if lab:
                self.process = lab.popen(name, [*command, self.address], bufsize=0, **pipes)
            else:
                self.process = subprocess.Popen([*command, self.address], bufsize=0, start_new_session=True, **pipes)
        self._buffer = b""

    def begin(self, do: str, **arguments: Any) -> None:
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")

    def end(self) -> dict:
        deadline = time.monotonic() + LONGEST_S
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not data:
                raise SystemExit(f"{self.name} has not answered\n{self.log.read_text()[-3000:]}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer = json.loads(line)
        self.peer = [self.name, *answer.pop("peer")]
        return answer

    def ask(self, do: str, **arguments: Any) -> dict:
        self.begin(do, **arguments)
        return self.end()

    def close(self) -> None:
        self.process.stdin.close()  # it then ends by itself
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
        self.process.stdout.close()


@contextlib.contextmanager
def remotes(lab: Any, count: int, folder: Path) -> Iterator[list[Remote]]:
    with contextlib.ExitStack() as stack:
        made = []
        for rank in range(count):
            made.append(Remote(lab, f"h{rank}", rank, folder / f"host-{rank}.log"))
            stack.callback(made[-1].close)
        for one in made:
            one.end()  # it says that it is there
        yield made


def together(hosts: Sequence[Remote], do: str, **arguments: Any) -> list[dict]:
    for host in hosts:
        host.begin(do, **arguments)
    return [host.end() for host in hosts]


def slowest(hosts: Sequence[Remote], do: str, **arguments: Any) -> float:
    return max(answer["seconds"] for answer in together(hosts, do, **arguments))


# --- push -------------------------------------------------------------------------------------------------------------


def push_section(options: argparse.Namespace, folder: Path) -> list[dict]:
    rows = []
    for rate in options.links:
        with lab_of(2, rate, folder) as lab:
            for nbytes in options.push:
                rows.append(push(lab, rate, nbytes, options.rounds, folder))
    return rows


def push(lab: Any, rate: str, nbytes: int, rounds: int, folder: Path) -> dict:
    with remotes(lab, 2, folder) as (a, b):
        for one, other in ((a, b), (b, a)):
            one.ask("replicate", peers=[other.peer], kept=[int(other.name[1:])])
        port = b.ask("listen", nbytes=nbytes)["port"]
        a.ask("connect", address=b.address, port=port, nbytes=nbytes)
        b.ask("accept")
        store = folder / f"store-{rate}-{nbytes}"
        reason = together([a, b], "peer_start", store=str(store), nbytes=nbytes)[0].get("reason")
        number = [0]

        def bare(_turn: int) -> float:
            b.begin("receive")
            seconds = a.ask("send")["seconds"]
            b.end()
            return seconds

        def copy(hosts: Sequence[Remote]) -> Callable[[int], float]:
            def call(_turn: int) -> float:
                number[0] += 1
                together(hosts, "capture", step=number[0], nbytes=nbytes)
                seconds = slowest(hosts, "push", step=number[0])
                together([a, b], "advance", step=number[0])
                return seconds

            return call

        def pairwise(_turn: int) -> float:
            number[0] += 1
            return slowest([a, b], "peer_exchange", step=number[0])

        contenders = {"bare socket": bare, "push": copy([a]), "both at once": copy([a, b])}
        if reason is None:
            contenders["lm-resiliency"] = pairwise
        taken = in_turns(contenders, rounds + WARM)
    seconds = {name: median(s for _, s in runs[WARM:]) for name, runs in taken.items()}
    ratios = {"push / bare socket": seconds["bare socket"] / seconds["push"]}
    peer = f"lm-resiliency not run: {reason}"
    if reason is None:
        ratios["lm-resiliency / both at once"] = seconds["lm-resiliency"] / seconds["both at once"]
        peer = f"lm-resiliency {seconds['lm-resiliency']:.3f} s: {ratios['lm-resiliency / both at once']:.2f}x"
    share, ours_s = ratios["push / bare socket"], seconds["push"]
    print(
        f"push {nbytes / 1e6:.0f} MB over {rate}: {ours_s:.3f} s, {nbytes / ours_s / 1e6:.0f} MB/s, bare socket "
        f"{seconds['bare socket']:.3f} s: {100 * share:.0f} % (goal 80 %{'' if share >= 0.8 else ' MISSED'}); "
        f"both hosts at once {seconds['both at once']:.3f} s, {peer}",
        flush=True,
    )
    all_s = {name: [s for _, s in runs[WARM:]] for name, runs in taken.items()}
    return {
        "rate": rate,
        "bytes": nbytes,
        "seconds": seconds,
        "seconds_all": all_s,
        "ratios": ratios,
        "not_run": reason,
    }


# --- restore ----------------------------------------------------------------------------------------------------------


def restore_section(options: argparse.Namespace, folder: Path) -> dict:
    from tests.lab.lab import bits_per_s

    nbytes, rate = options.restore, "1gbit"
    with lab_of(4, rate, folder) as lab:
        checkpoints = lab.nfs_up() / "checkpoint"
        for name in lab.hosts:
            lab.bandwidth(name, rate)
        with remotes(lab, 4, folder) as hosts:
            shards = hosts[0].ask("train", nbytes=nbytes, folder=str(checkpoints))["shards"]
            read = sum(file.stat().st_size for file in Path(lab.folder / "nas-disk" / "checkpoint").rglob("*.pt"))
            contenders = {
                "fetch": lambda _: hosts[1].ask("fetch", wanted=shards, peer=hosts[0].peer)["seconds"],
                "attach": lambda _: hosts[1].ask("restore", nbytes=nbytes)["seconds"],
                "load_checkpoint": lambda _: hosts[1].ask("load", nbytes=nbytes, folder=str(checkpoints))["seconds"],
                "load_checkpoint, 4 hosts": lambda _: slowest(hosts, "load", nbytes=nbytes, folder=str(checkpoints)),
            }
            taken = in_turns(contenders, options.slow_rounds)
    seconds = {name: median(s for _, s in runs) for name, runs in taken.items()}
    ours, share = seconds["fetch"] + seconds["attach"], nbytes / seconds["fetch"] / (bits_per_s(rate) / 8)
    ratios = {
        "share of the link": share,
        "load_checkpoint / ours": seconds["load_checkpoint"] / ours,
        "load_checkpoint, 4 hosts / ours": seconds["load_checkpoint, 4 hosts"] / ours,
    }
    print(
        f"restore {nbytes / 1e6:.0f} MB from a peer at 1 Gbit/s: fetch {seconds['fetch']:.2f} s, {100 * share:.0f} % of the "
        f"link (goal 80 %), attach {seconds['attach']:.2f} s; load_checkpoint reads {read / 1e6:.0f} MB from the network file "
        f"system: one host {seconds['load_checkpoint']:.2f} s, {ratios['load_checkpoint / ours']:.1f}x, four at once "
        f"{seconds['load_checkpoint, 4 hosts']:.2f} s, {ratios['load_checkpoint, 4 hosts / ours']:.1f}x (goal 3x)",
        flush=True,
    )
    return {"bytes": nbytes, "checkpoint_bytes": read, "seconds": seconds, "ratios": ratios}


# --- loss -------------------------------------------------------------------------------------------------------------


def loss_section(options: argparse.Namespace, folder: Path) -> list[dict]:
    rows = []
    for rate in options.rates:
        with lab_of(4, rate, folder) as lab:
            for nbytes in options.states:
                needed = len(HOSTS) * (slots_bytes(nbytes, 2) + TRAINER * nbytes)
                if needed > machine()["memory_bytes"]:
                    print(
                        f"not run: loss {nbytes / 1e6:.0f} MB per rank: 4 hosts need {needed / 1e9:.0f} GB of this machine"
                    )
                    continue
                rows.append(loss(lab, rate, nbytes, options, folder))
    return rows


def loss(lab: Any, rate: str, nbytes: int, options: argparse.Namespace, folder: Path) -> dict:
    def call(name: str) -> Callable[[int], dict]:
        return lambda turn: one_job(lab, name, nbytes, options, folder / f"{rate}-{nbytes}-{turn}-{name.split()[-1]}")

    taken = in_turns({name: call(name) for name in VARIANTS}, options.slow_rounds)
    runs = {name: [found for _, found in its] for name, its in taken.items()}
    base = runs["one copy"]
    result: dict[str, Any] = {"rate": rate, "bytes": nbytes, "compute_s": options.compute, "busy": options.busy}
    result["runs"] = runs
    for name, its in runs.items():
        lost = median(one["step_s"] / alone["step_s"] - 1 for one, alone in zip(its, base, strict=True))
        step_s, every = median(one["step_s"] for one in its), median(one["every"] for one in its)
        cpu_s = median(one["replicators_cpu_s"] for one in its)
        goal = (
            ""
            if name == "one copy"
            else f": {100 * lost:+.1f} % (goal <= 1 % where it fits into idle time, 5 % always)"
        )
        held, formula = its[-1]["held_bytes"], its[-1]["formula_bytes"]
        result[name] = {"step_s": step_s, "lost": lost, "every": every, "replicators_cpu_s": cpu_s}
        print(
            f"loss {nbytes / 1e6:.0f} MB per rank at {rate}, {name}: step {step_s:.3f} s{goal}; "
            f"a snapshot every {every:.1f} steps; replicators {1e3 * cpu_s:.0f} ms of CPU time per step, "
            f"{100 * cpu_s / step_s / (os.cpu_count() or 1):.1f} % of the machine; slots hold {held / 1e6:.1f} MB on h1, "
            f"{held / formula:.3f} of the formula, {100 * held / machine()['memory_bytes']:.2f} % of the machine",
            flush=True,
        )
    return result


def one_job(lab: Any, variant: str, nbytes: int, options: argparse.Namespace, run_dir: Path) -> dict:
    """A job of ``variant`` for ``options.steps`` steps."""
    parameters = nbytes // 12 * len(HOSTS)  # masters and two moments, cut in 4
    settings = [
        "model._target_=wide.Wide",
        f"model.kwargs.parameters={parameters}",
        f"model.kwargs.compute_s={options.compute}",
        f"model.kwargs.busy={str(options.busy).lower()}",
        "deepspeed=zero1",
        "training.epochs=10000",
        "evaluation.every=10000",
        "snapshot.persist_every=never",
        *VARIANTS[variant],
    ]
    os.environ["PYTHONPATH"] = str(ROOT / "benchmarks")
    job = recovery.start(run_dir, lab, "launch/train.py", settings)
    begin, deadline = options.steps // 4, time.monotonic() + LONGEST_S
    here = Path(f"/proc/{lab.hosts['h1'].pid}/root{home.arena_of(run_dir)}")
    try:
        wait_for(run_dir, begin, job, deadline)
        before, first = cpu_of(replicators(run_dir)), recovery.steps(run_dir)
        wait_for(run_dir, options.steps, job, deadline)
        used, last = cpu_of(replicators(run_dir)) - before, recovery.steps(run_dir)
        held = sum(file.stat().st_blocks * 512 for file in home.snapshot_files(here))
    finally:
        recovery.kill(recovery.everything(run_dir, lab))
        job.wait(30)
        for name in HOSTS:
            folder = Path(f"/proc/{lab.hosts[name].pid}/root{home.arena_of(run_dir)}")
            shutil.rmtree(folder, ignore_errors=True)
    step_s, every = pace(recovery.events(run_dir), begin)
    replicas = 1 if variant == "one copy" else 2
    return {
        "step_s": step_s,
        "every": every,
        "replicators_cpu_s": used / (last - first),
        "held_bytes": held,
        "formula_bytes": slots_bytes(nbytes + format.PAGE + format.TAIL_ROOM, replicas),
    }


def wait_for(run_dir: Path, step: int, job: subprocess.Popen[bytes], deadline: float) -> None:
    while recovery.steps(run_dir) < step:
        if time.monotonic() > deadline or job.poll() is not None:
            raise SystemExit(f"{run_dir.name}: no step {step}\n{recovery.said(run_dir)}")
        time.sleep(0.05)


def replicators(run_dir: Path) -> list[int]:
    found = recovery.processes(run_dir).items()
    return [pid for pid, words in found if "gemini_gnn.recovery.worker.replicator" in words]


# --- compress ---------------------------------------------------------------------------------------------------------


def codecs() -> dict[str, Callable[[bytes], bytes]]:
    found: dict[str, Callable[[bytes], bytes]] = {"zlib 1": lambda raw: zlib.compress(raw, 1)}
    if importlib.util.find_spec("lz4"):
        import lz4.frame

        found["lz4"] = lz4.frame.compress
    if importlib.util.find_spec("zstandard"):
        import zstandard

        found["zstd 1"] = zstandard.ZstdCompressor(level=1).compress
    return found


def compress_section(options: argparse.Namespace, folder: Path) -> list[dict]:
    rows = []
    for dataset in options.datasets:
        a, b = successive(dataset, options.steps, folder)
        same = {size: unchanged(a, b, size) for size in PAGES}
        row: dict[str, Any] = {"dataset": dataset, "bytes": len(b), "unchanged": same, "codecs": []}
        shares = ", ".join(f"{100 * share:.1f} % of the pieces of {size} bytes" for size, share in same.items())
        print(f"compress {dataset}, {len(b) / 1e6:.1f} MB, step to step: {shares} are unchanged")
        for what, make in {
            "the state": lambda b=b: b,
            "what has changed": lambda a=a, b=b: a ^ b,
            "the same in planes": lambda a=a, b=b: planes(a ^ b),
        }.items():
            for name, compress in codecs().items():
                once = {name: lambda _, f=compress, m=make: len(f(m().tobytes()))}
                taken = in_turns(
                    once, options.rounds, time.process_time
                )  # one thread: without the waiting of a busy machine
                seconds, size = median(s for s, _ in taken[name]), taken[name][0][1]
                ratio, speed = size / len(b), len(b) / seconds
                gains = {rate: gain(ratio, speed, rate / 8) for rate in (1e9, 10e9)}
                row["codecs"].append({"of": what, "codec": name, "ratio": ratio, "bytes_s": speed, "gains": gains})
                print(
                    f"  {what}, {name}: {ratio:.3f} of the bytes at {speed / 1e6:.0f} MB/s: {gains[1e9]:.2f}x at 1 Gbit/s, "
                    f"{gains[10e9]:.2f}x at 10 Gbit/s: {'worth it' if gains[1e9] >= GAIN else 'rejected'} (kept from {GAIN}x on)",
                    flush=True,
                )
        rows.append(row)
    return rows


def successive(dataset: str, steps: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The tensors of the last two snapshots in memory of a training that is killed after ``steps`` steps."""
    run_dir = folder / dataset
    command = [sys.executable, "launch/train.py", f"dataset={dataset}", f"run_dir={run_dir}", "logger=quiet"]
    command += ["training.epochs=10000", "evaluation.every=10000", "snapshot.persist_every=never"]
    with open(f"{run_dir}.log", "ab") as log:
        job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(run_dir, steps, job, time.monotonic() + LONGEST_S)
        recovery.kill(recovery.everything(run_dir, None))
        job.wait(30)
        found = {}
        for file in arena.slots(home.arena_of(run_dir)):
            header = file.header()
            if header is not None and header.state is SlotState.COMMITTED:
                manifest, raw = file.manifest(header)
                pieces = [np.frombuffer(piece, np.uint8) for piece in arena.tensor_pieces(manifest, raw)]
                found.setdefault(header.identity, {})[file.shard] = np.concatenate([np.empty(0, np.uint8), *pieces])
            file.close()
    finally:
        recovery.kill(recovery.everything(run_dir, None))
        job.wait(30)
        shutil.rmtree(home.arena_of(run_dir), ignore_errors=True)
    last, before = sorted(found, reverse=True)[:2]
    a, b = (np.concatenate([found[one][shard] for shard in sorted(found[last])]) for one in (before, last))
    return a, b


# --- all --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lab_of(hosts: int, rate: str, folder: Path) -> Iterator[Any]:
    """A lab with links of ``rate``; None for this machine's loopback."""
    if rate == LOOPBACK:
        yield None
        return
    from tests.lab.lab import Lab

    with Lab.up(folder / "lab", hosts=hosts, owned=True) as lab:
        for name in lab.hosts:
            lab.bandwidth(name, rate)
        yield lab


PARTS = {"push": push_section, "restore": restore_section, "loss": loss_section, "compress": compress_section}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--links", nargs="+", default=["1gbit", "10gbit", LOOPBACK], help="of part push")
    parser.add_argument("--rates", nargs="+", default=["1gbit", "10gbit"], help="of part loss")
    parser.add_argument("--push", nargs="+", type=float, default=[200e6], help="bytes")
    parser.add_argument("--restore", type=float, default=1e9, help="bytes")
    parser.add_argument("--states", nargs="+", type=float, default=[10e6, 100e6, 1e9], help="bytes per rank")
    parser.add_argument("--compute", type=float, default=0.5, help="seconds of a forward pass of part loss")
    parser.add_argument("--busy", action="store_true", help="it computes meanwhile")
    parser.add_argument("--steps", type=int, default=32, help="of a job of parts loss and compress")
    parser.add_argument("--datasets", nargs="+", default=["blocks", "cora"], help="of part compress")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-rounds", type=int, default=3, help="of parts restore and loss")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "replication.json")
    options = parser.parse_args()
    if options.quick:
        options.push, options.restore, options.states = [10e6], 30e6, [1e6]
        options.compute, options.steps, options.rounds, options.slow_rounds = 0.1, 8, 2, 1
        options.datasets = ["blocks"]
    options.push, options.states = [int(n) for n in options.push], [int(n) for n in options.states]
    options.restore = int(options.restore)
    sys.path.insert(0, str(ROOT))
    from tests.lab.lab import missing

    signal.signal(signal.SIGTERM, recovery.end)
    results: dict[str, Any] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(options).items()}}
    print(results["machine"])
    parts = list(PARTS) if options.part == "all" else [options.part]
    reason = missing()
    with tempfile.TemporaryDirectory() as folder:
        for name in parts:
            on_lab = name in ("restore", "loss") or (name == "push" and set(options.links) != {LOOPBACK})
            if on_lab and reason:
                print(f"not run: {name}: {reason}")
                continue
            results[name] = PARTS[name](options, Path(folder))
            results["load_1min_at_end"] = os.getloadavg()[0]
            write(options.output, results)


if __name__ == "__main__":
    main()
