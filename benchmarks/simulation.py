"""The cost of failures on 16 to 10,000 machines: copies in memory by group, mixed and ring placement, beside NFS.

    python benchmarks/simulation.py                              (half a minute, one core; nothing is run on other machines)
    python benchmarks/simulation.py --measured results/recovery.json results/replication.json
    python benchmarks/simulation.py --machines 1000 --replicas 2 --failures llama --cost state_bytes=75e9 --cost replace_s=330

Each row twice: by formula, and simulated failure by failure with a seed (gemini_gnn/snapshot/replicas/simulation.py says what
is modelled). Costs come from the JSON of recovery.py and replication.py as far as those are given, else they are assumed; the
output says which. Failure rates are published ones; the output has their sources.

    group, mixed   the placement of this project: groups where replicas divide the machines, else groups and one ring
    ring           all machines in one ring
    NFS            checkpoints on one file server, each at the best interval there is; all machines read them after a failure
    NFS, links     the same on storage that is as fast as the links of all machines together: the best a baseline could have

"2, 3 lost" is the probability that memory keeps every shard if so many machines are lost at once. "30 days" is that of 30
days in which every failure is survived from memory. "T" is GEMINI's wasted time per failure. "wasted" is all that is no
progress, by failure; "goodput" the share of time that is. "x" says how often it fits into that of NFS.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import exp
from pathlib import Path
from typing import Any

from common import machine, median, write

from gemini_gnn.snapshot.replicas.placement import Placement, placement, survival
from gemini_gnn.snapshot.replicas.simulation import (
    DAY_S,
    Costs,
    Failures,
    Outcome,
    Scheme,
    expected,
    in_memory,
    on_storage,
    rollback_s,
    simulate,
)

ROOT = Path(__file__).resolve().parent.parent
TOGETHER = 0.01  # assumed: of lost machines, those that are lost together with another one
PERIOD_S = 30 * DAY_S
FAILURES = {
    "opt": Failures(
        0.015,
        1.0,
        TOGETHER,
        "1.5 % of the machines fail in a day: logbook of OPT-175B, as GEMINI (SOSP'23) reads it. "
        "Here all of them count as lost machines",
    ),
    "llama": Failures(
        419 / 54 / (16_384 / 8),
        0.78,
        TOGETHER,
        "419 unexpected interruptions in 54 days on 16,384 GPUs, 8 in a machine; 78 % of them hardware: "
        "The Llama 3 Herd of Models (2024)",
    ),
    "clusters": Failures(
        24 / 7.9 / (1024 / 8),
        1.0,
        TOGETHER,
        "jobs on 1,024 GPUs, 8 in a machine, fail after 7.9 h on average: Kokolis et al., Revisiting Reliability in "
        "Large-Scale Machine Learning Research Clusters (HPCA 2025). Here all of them count as lost machines",
    ),
}
ASSUMED = {
    "state_bytes": (1e9, "per machine"),
    "step_s": (1.0, "a step"),
    "slowdown": (0.0, "as GEMINI publishes; replication.py measures it"),
    "process_s": (1.0, "recovery.py's goal for a trainer on 4 hosts"),
    "machine_s": (2.5, "recovery.silence_s of 1.5 s, and as for a process"),
    "replace_s": (0.0, "a standby waits"),
    "relaunch_s": (15.0, "launcher and imports, as for small jobs; large ones take minutes"),
    "memory_bytes_s": (2e9, "one core"),
    "link_bytes_s": (1e9, "80 % of 10 Gbit/s"),
    "storage_bytes_s": (2.5e9, "20 Gbit/s, as GEMINI's file server"),
    "persist_s": (600.0, "snapshot.persist_every"),
}
HEAD = (
    f"{'failures':<9}{'machines':>9} {'scheme':<18}{'2 lost':>9}{'3 lost':>9}{'30 days':>9}{'T':>9}"
    f"{'wasted, simulated':>20}{'goodput, simulated':>20}{'x':>7}"
)


@dataclass(frozen=True)
class Row:
    failures: str
    machines: int
    scheme: str
    replicas: int  # 0: NFS
    survives: tuple[float, ...] | None  # 2, 3 machines lost at once
    kept: float | None
    memory_lost: float  # the share of failures
    rollback_s: float
    interval_s: float
    formula: Outcome
    simulated: Outcome
    times: float | None  # the wasted time of NFS, by this


# --- costs: pure ------------------------------------------------------------------------------------------------------


def measured(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """Costs from the JSON of recovery.py and replication.py, and where each is from."""
    found: dict[str, tuple[float, str]] = {}
    for name, document in documents.items():
        found |= {cost: (value, f"{name}: {where}") for cost, (value, where) in _from_recovery(document).items()}
        found |= {cost: (value, f"{name}: {where}") for cost, (value, where) in _from_replication(document).items()}
    return found


def _from_recovery(document: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    rows = document.get("rows")
    if not isinstance(rows, Mapping) or "counted_s" not in document:
        return {}

    def without(name: str, *parts: str) -> float:
        return median(run["counted_s"] - sum(run["parts"].get(part, 0.0) for part in parts) for run in rows[name])

    machines = [name for name in rows if name.startswith("lab-") and "machine" in name]
    cost_of = {
        "process_s": (["lab-trainer", "trainer"], ["restore"]),
        "machine_s": (machines, ["restore"]),
        "relaunch_s": (["lab-checkpoint", "checkpoint"], ["restore", "steps again"]),
    }
    found = {}
    for cost, (names, parts) in cost_of.items():
        if name := next((name for name in names if name in rows), None):
            found[cost] = (without(name, *parts), f"{name} without {' and '.join(parts)}")
    return found


def _from_replication(document: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    found = {}
    pushed = [row for row in document.get("push", []) if row["rate"] != "loopback"]
    if pushed:
        best = max(pushed, key=lambda row: row["bytes"] / row["seconds"]["push"])
        found["link_bytes_s"] = (best["bytes"] / best["seconds"]["push"], f"push over {best['rate']}")
    if restore := document.get("restore"):
        nbytes, seconds = restore["bytes"], restore["seconds"]
        found["memory_bytes_s"] = (nbytes / seconds["attach"], "restore, attach")
        found["storage_bytes_s"] = (4 * nbytes / seconds["load_checkpoint, 4 hosts"], "load_checkpoint, 4 hosts")
    if lost := [row["two, interleaved"]["lost"] for row in document.get("loss", [])]:
        found["slowdown"] = (max(0.0, median(lost)), "loss, two copies, interleaved")
    return found


def costs_of(found: Mapping[str, tuple[float, str]], given: Mapping[str, float]) -> tuple[Costs, dict[str, str]]:
    """What was given, else measured, else assumed; and which of these."""
    values = {name: value for name, (value, _) in ASSUMED.items()}
    sources = {name: f"ASSUMED: {why}" for name, (_, why) in ASSUMED.items()}
    for name, (value, where) in found.items():
        values[name], sources[name] = value, f"measured, {where}"
    if "process_s" in found and "machine_s" not in found:
        values["machine_s"] = values["process_s"] + 1.5
        sources["machine_s"] = "ASSUMED: recovery.silence_s of 1.5 s, and as measured for a process"
    for name, value in given.items():
        values[name], sources[name] = value, "given by --cost"
    return Costs(**values), sources


# --- rows: pure -------------------------------------------------------------------------------------------------------


def ring(machines: int, replicas: int) -> Placement:
    return tuple(tuple((machine + i) % machines for i in range(replicas)) for machine in range(machines))


def schemes(
    costs: Costs, machines: int, replicas: Sequence[int], failures: Failures
) -> Iterator[tuple[str, int, Scheme]]:
    """Name, replicas (0: none) and scheme of each row; NFS first."""
    yield "NFS", 0, on_storage(costs, machines, failures)
    links = replace(costs, storage_bytes_s=machines * costs.link_bytes_s)
    yield "NFS, links", 0, on_storage(links, machines, failures)
    for m in (m for m in replicas if m <= machines):
        kind = "mixed" if machines % m else "group"
        yield f"m={m}, {kind}" if m > 1 else "m=1", m, in_memory(costs, placement(machines, m))
        if 1 < m < machines:
            yield f"m={m}, ring", m, in_memory(costs, ring(machines, m))


def rows_of(
    names: Sequence[str], machines: Sequence[int], replicas: Sequence[int], costs: Costs, many: int, seed: int
) -> Iterator[Row]:
    for name in names:
        for n in machines:
            nfs_s = None
            for scheme_name, m, scheme in schemes(costs, n, replicas, FAILURES[name]):
                row = row_of(name, scheme_name, m, scheme, nfs_s, many, seed)
                nfs_s = nfs_s or row.formula.wasted_s
                yield row


def row_of(name: str, scheme_name: str, m: int, scheme: Scheme, nfs_s: float | None, many: int, seed: int) -> Row:
    failures, machines = FAILURES[name], scheme.machines
    formula = expected(scheme, failures)
    losses = formula.memory_lost * failures.rate(machines)
    return Row(
        failures=name,
        machines=machines,
        scheme=scheme_name,
        replicas=m,
        survives=tuple(survival(scheme.holders, min(lost, machines)) for lost in (2, 3)) if m else None,
        kept=exp(-losses * PERIOD_S) if m else None,
        memory_lost=formula.memory_lost,
        rollback_s=rollback_s(scheme, failures, formula.memory_lost),
        interval_s=scheme.interval_s,
        formula=formula,
        simulated=simulate(scheme, failures, many, seed),
        times=nfs_s / formula.wasted_s if nfs_s else None,
    )


def line(row: Row) -> str:
    survives = "".join(f"{_share(one):>9}" for one in row.survives or (None, None))
    wasted = f"{row.formula.wasted_s:>10.1f} {row.simulated.wasted_s:>9.1f}"
    goodput = f"{_share(row.formula.goodput):>10} {_share(row.simulated.goodput):>9}"
    times = f"{row.times:>6.1f}x" if row.times else ""
    return (
        f"{row.failures:<9}{row.machines:>9,} {row.scheme:<18}{survives}{_share(row.kept and min(row.kept, 0.9999)):>9}"
        f"{row.rollback_s:>9.1f}{wasted}{goodput}{times}"
    )


def _share(value: float | None) -> str:
    """Never 100 % or 0 % of what is not certain."""
    if value is None:
        return "-"
    if value in (0.0, 1.0):
        return f"{value * 100:.0f} %"
    return f"{min(max(value * 100, 0.01), 99.99):.2f} %"


# --- picture ----------------------------------------------------------------------------------------------------------

COLORS = {0: "#d62728", 1: "#7f7f7f", 2: "#1f77b4", 3: "#2ca02c", 4: "#9467bd"}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Goodput, wasted time and losses of memory over the number of machines, a column per failure rate.

    Args:
        rows: of the JSON.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["failures"] for row in rows))
    figure = Figure(figsize=(4.6 * len(names) + 2.4, 10), dpi=100, layout="constrained")
    grid = figure.subplots(3, len(names), squeeze=False, sharex=True, sharey="row")
    for name, column in zip(names, grid.T, strict=True):
        here = [row for row in rows if row["failures"] == name]
        for label in dict.fromkeys(_label(row) for row in here):
            one = sorted((row for row in here if _label(row) == label), key=lambda row: row["machines"])
            style = {"color": COLORS.get(one[0]["replicas"], "black"), "label": label, "markersize": 4}
            style |= {"linestyle": "--", "marker": "x"} if "ring" in label or "links" in label else {"marker": "o"}
            at = [row["machines"] for row in one]
            column[0].plot(at, [100 * row["formula"]["goodput"] for row in one], **style)
            column[1].plot(at, [row["formula"]["wasted_s"] for row in one], **style)
            column[1].plot(at, [row["simulated"]["wasted_s"] for row in one], "+", color="black", markersize=9)
            if one[0]["replicas"]:
                column[2].plot(at, [max(1 - row["kept"], 1e-12) for row in one], **style)
        column[0].set(title=f"failure rate: {name}")
        column[1].set(yscale="log")
        column[2].set(xscale="log", yscale="log", xlabel="machines", ylim=(1e-9, 2))
    for axes, label in zip(
        grid[:, 0], ("goodput, %", "wasted seconds per failure", "memory not enough within 30 days"), strict=True
    ):
        axes.set_ylabel(label)
    for axes in grid.flat:
        axes.grid(alpha=0.25)
    grid[1, -1].plot([], [], "+", color="black", markersize=9, label="simulated")
    handles, labels = grid[1, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.savefig(path)


def _label(row: Mapping[str, Any]) -> str:
    return row["scheme"].replace("mixed", "group").replace("group", "group or mixed")


# --- all --------------------------------------------------------------------------------------------------------------


def given(texts: Sequence[str]) -> dict[str, float]:
    """Of ``--cost name=value``."""
    known = {field.name for field in fields(Costs)}
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        positive = found[name] > 0 or (found[name] == 0 and name in ("slowdown", "replace_s"))
        if name not in known or not positive:
            raise argparse.ArgumentTypeError(
                f"--cost {text}: expected NAME=NUMBER, above 0, with a name of {', '.join(sorted(known))}"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, nargs="+", default=[16, 64, 256, 1000, 4000, 10_000])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--failures", nargs="+", choices=list(FAILURES), default=list(FAILURES))
    parser.add_argument("--measured", type=Path, nargs="+", default=[], metavar="FILE", help="JSON of other benchmarks")
    parser.add_argument(
        "--cost", action="append", default=[], metavar="NAME=VALUE", help="goes before what was measured"
    )
    parser.add_argument("--many", type=int, default=4000, help="failures that are simulated for each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "simulation.json")
    options = parser.parse_args()
    if min(*options.machines, *options.replicas, options.many) < 1:
        parser.error("--machines, --replicas and --many: expected numbers from 1 on")
    try:
        documents = {path.name: json.loads(path.read_text()) for path in options.measured}
        wanted = given(options.cost)
    except (OSError, ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    costs, sources = costs_of(measured(documents), wanted)
    for name, value in asdict(costs).items():
        print(f"{name:<17}{value:>12.4g}  {sources[name]}")
    for name in options.failures:
        one = FAILURES[name]
        print(f"{name}: {100 * one.per_machine_day:.2f} % of the machines fail in a day. {one.source}")
    print(f"ASSUMED: {100 * TOGETHER:.0f} % of lost machines are lost together with another one\n\n{HEAD}")
    rows = []
    for row in rows_of(options.failures, options.machines, options.replicas, costs, options.many, options.seed):
        print(line(row), flush=True)
        rows.append(asdict(row))
    head = {
        "machine": machine(),
        "costs": {name: {"value": v, "source": sources[name]} for name, v in asdict(costs).items()},
    }
    published = {name: asdict(FAILURES[name]) for name in options.failures}
    write(options.output, head | {"failures": published, "many": options.many, "seed": options.seed, "rows": rows})
    draw(rows, options.output.with_suffix(".png"))
    print(f"drawn in {options.output.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main())
