"""The results of all benchmarks on one page: docs/report.md, with plots beside it.

    python benchmarks/report.py [--results results] [--output docs/report.md]

It reads the JSON that each benchmark has written, and runs none. Each figure has its date, commit, machine and command. A
result is called old if the code has changed since its commit. A missed goal is said with the part that takes the time, as far
as the JSON has parts. A benchmark without JSON is named with the command that would measure it.
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, git, median

Document = Mapping[str, Any]
Contenders = list[tuple[str, list[tuple[str, float]]]]  # groups of bars: label, then name and value of each
OURS = {"snapshot", "memory", "push", "both at once", "fetch", "attach", "two, interleaved", "gemini_gnn", "metis"}
OURS |= {
    "metis+edges",
    "sparse",
    "sparse, 1 rank",
    "auto",
    "blocks",
    "blocks beside NetworkX",
    "PyGSampler",
    "NodeLoader + PyGSampler",
}
GREEN, RED, GREY, BLUE = "#2ca02c", "#d62728", "#7f7f7f", "#1f77b4"

# Goals that no benchmark has in its code or JSON.
PUSH_SHARE, LINK_SHARE, LOAD_TIMES = 0.8, 0.8, 3.0  # replication.py
LOST, LOST_AT_MOST = 0.01, 0.05  # of throughput: where copies fit into idle time, and always
STALL_SHARE, RESTORE_TIMES = 0.02, 10.0  # snapshot.py
NETWORKX_TIMES = 100.0  # sampling.py
BF16_SHARE, TWO_RANKS_TIMES = 0.6, 1.82  # training.py


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        value: what is judged, in ``unit``: "s", "x", "%" (a share, 0..1) or "" (a number).
        beside: the peer's figures and others, from the same run.
        goal: None: there is none. ``most``: it is an upper limit, else a lower one.
        eats: the part that takes the time, where the goal is missed.
    """

    what: str
    value: float
    unit: str
    beside: str = ""
    goal: float | None = None
    most: bool = False
    eats: str = ""

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.most else self.value >= self.goal

    def row(self) -> str:
        sign = "<=" if self.most else ">="
        goal = "" if self.goal is None else f"{sign} {shown(self.goal, self.unit)}"
        met = {None: "", True: "met", False: "**MISSED**"}[self.met]
        return f"| {self.what} | {shown(self.value, self.unit)} | {self.beside} | {goal} | {met} |"


def shown(value: float, unit: str) -> str:
    if unit == "%":
        digits = 1 if abs(value) < 0.1 else 2 if 0.99 < value < 1 else 0
        return f"{100 * value:.{digits}f} %"
    if unit == "s":
        return f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.2g} ms"
    digits = 3 if unit == "" and abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}{unit}"


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def parts_in_words(parts: Mapping[str, float]) -> str:
    """The largest first."""
    return ", ".join(f"{name} {shown(s, 's')}" for name, s in sorted(parts.items(), key=lambda one: -one[1]) if s > 0)


# --- one function per benchmark: its JSON -> lines. Pure --------------------------------------------------------------


def recovery_lines(document: Document) -> Iterator[Line]:
    import recovery

    counted, rows = document["counted_s"], document["rows"]
    for name, runs in rows.items():
        row = recovery.ROWS.get(name, recovery.Row(name, recovery.nobody))
        ours = counted[name]
        parts = recovery.medians([recovery.Measured(**run) for run in runs])
        eats = parts_in_words(parts)
        whole = median(run["seconds"] for run in runs)
        beside = f"{shown(whole, 's')} in all, {median(run['again'] for run in runs):.0f} steps done again"
        yield Line(row.what, ours, "s", beside, row.goal_s, True, eats)
        if row.peer in counted:
            peer_s = counted[row.peer]
            goal = recovery.TIMES_FASTER if row.goal_s is not None else None
            yield Line(
                f"{row.what}: times faster", peer_s / ours, "x", f"{shown(peer_s, 's')} {row.peer}", goal, eats=eats
            )
    for one in document.get("by_bytes", {}).get("rows", []):
        yield from lost_machine_lines(one, document["machine"]["memory_bytes"])
    for name, share in document.get("idle_cpu", {}).items():
        yield Line(f"the busiest {name} without traffic: CPU time, of a core", share, "%", "", recovery.IDLE_CPU, True)


def lost_machine_lines(row: Mapping[str, Any], memory_bytes: int) -> Iterator[Line]:
    """With so much state per rank, beside checkpoints on the network file system."""
    import recovery

    ours, theirs, eats = row["ours"], row["checkpoints"], parts_in_words(row["ours"]["parts"])
    at = f"a machine lost, {megabytes(row['bytes'])} per rank at {row['rate']}"
    for name, goal in (("retrieve", None), ("recovery", recovery.TIMES_FASTER), ("wasted", recovery.WASTED_TIMES)):
        beside = f"{shown(ours[f'{name}_s'], 's')}; checkpoints {shown(theirs[f'{name}_s'], 's')}"
        yield Line(f"{at}: {name}, times less", row["times"][name], "x", beside, goal, eats=eats)
    beside = f"step {shown(ours['step_s'], 's')}, between two checkpoints {shown(theirs['step_s'], 's')}"
    yield Line(f"{at}: throughput lost before", row["lost"], "%", beside, recovery.LOST, True, beside)
    beside = f"checkpoints {shown(theirs['goodput'], '%')}, one every {shown(theirs['interval_s'], 's')}"
    beside += f"; assumed: a failure every {row['mtbf_s']:,.0f} s"
    yield Line(f"{at}: goodput", ours["goodput"], "%", beside)
    held = ours["held_bytes"]
    yield Line(f"{at}: memory of a host for snapshots", held / memory_bytes, "%", megabytes(held))


def recovery_notes(document: Document) -> list[str]:
    return [f"- skipped: {reason}" for reason in document.get("by_bytes", {}).get("skipped", [])]


def replication_lines(document: Document) -> Iterator[Line]:
    for row in document.get("push", []):
        seconds, at = row["seconds"], f"{megabytes(row['bytes'])} over {row['rate']}"
        over = seconds["push"] - seconds["bare socket"]
        eats = f"{shown(over, 's')} beyond the bytes: checksum, acknowledgement, and cores that both ends share"
        beside = f"{shown(seconds['push'], 's')}; bare socket {shown(seconds['bare socket'], 's')}"
        yield Line(
            f"a copy of {at}: share of a bare socket",
            row["ratios"]["push / bare socket"],
            "%",
            beside,
            PUSH_SHARE,
            eats=eats,
        )
        if "lm-resiliency" in seconds:
            beside = f"{shown(seconds['both at once'], 's')}; lm-resiliency {shown(seconds['lm-resiliency'], 's')}"
            yield Line(
                f"both hosts copy {at}: times faster", row["ratios"]["lm-resiliency / both at once"], "x", beside
            )
    if restore := document.get("restore"):
        seconds, ratios = restore["seconds"], restore["ratios"]
        eats = parts_in_words({name: seconds[name] for name in ("fetch", "attach")})
        at = f"restore {megabytes(restore['bytes'])} from a peer"
        yield Line(
            f"{at}: share of the link",
            ratios["share of the link"],
            "%",
            f"fetch {shown(seconds['fetch'], 's')}",
            LINK_SHARE,
            eats=eats,
        )
        for peer in ("load_checkpoint", "load_checkpoint, 4 hosts"):
            yield Line(
                f"{at}: times faster than {peer}",
                ratios[f"{peer} / ours"],
                "x",
                f"{eats}; {peer} {shown(seconds[peer], 's')}",
                LOAD_TIMES,
                eats=eats,
            )
    for row in document.get("loss", []):
        for name in ("two, interleaved", "two, at any time"):
            one = row[name]
            cpu = f"replicators {shown(one['replicators_cpu_s'], 's')} of CPU time per step"
            alone_s, fits = row["one copy"]["step_s"], name == "two, interleaved" and one["every"] < 1.5
            beside = f"step {shown(one['step_s'], 's')}, one copy {shown(alone_s, 's')}"
            beside += f"; a snapshot every {one['every']:.1f} steps"
            yield Line(
                f"throughput lost, {megabytes(row['bytes'])} per rank at {row['rate']}: {name}",
                one["lost"],
                "%",
                beside,
                LOST if fits else LOST_AT_MOST,
                True,
                cpu,
            )
    for row in document.get("compress", []):
        best = max(row["codecs"], key=lambda one: one["gains"].get("1000000000.0", 0.0))
        gain = best["gains"]["1000000000.0"]
        yield Line(
            f"{row['dataset']}: best codec at 1 Gbit/s, times faster",
            gain,
            "x",
            f"{best['codec']} of {best['of']}: {best['ratio']:.2f} of the bytes",
        )


def snapshot_lines(document: Document) -> Iterator[Line]:
    for one in document.get("stall", {}).values():
        stall, memcpy, limit = (shown(n, "s") for n in (one["stall_s"], one["memcpy_s"], STALL_SHARE * one["memcpy_s"]))
        beside = f"{stall}; memcpy {memcpy}, async_save {shown(one['async_save_s'], 's')}"
        eats = f"a stall of {stall}; the goal allows {limit} for so few bytes"
        yield Line(
            f"stall per snapshot of {megabytes(one['bytes'])}, share of memcpy",
            one["ratios"]["stall / memcpy"],
            "%",
            beside,
            STALL_SHARE,
            True,
            eats,
        )
        yield Line(f"{megabytes(one['bytes'])}: times less than async_save", one["ratios"]["async_save / stall"], "x")
    if restore := document.get("restore"):
        seconds = restore["seconds"]
        beside = f"{shown(seconds['memory'], 's')}; load_checkpoint from a warm file {shown(seconds['load_checkpoint'], 's')}"
        yield Line(
            f"restore {megabytes(restore['bytes'])}: times faster",
            restore["ratios"]["load_checkpoint / memory"],
            "x",
            beside,
            RESTORE_TIMES,
        )
    if loss := document.get("loss"):
        step, without = shown(loss["step_with_s"], "s"), shown(loss["step_without_s"], "s")
        beside = f"step {step}, without {without}; ranks: {loss['world_size']}"
        eats = f"stall of {shown(loss['stall_per_snapshot_s'], 's')} per snapshot"
        yield Line(
            "throughput lost, a snapshot per step", loss["ratios"]["loss of throughput"], "%", beside, LOST, True, eats
        )


def sampling_lines(document: Document) -> Iterator[Line]:
    for graph, one in document["graphs"].items():
        rates = {name: each["edges_per_s"] for name, each in one["contenders"].items()}
        eats = ", ".join(f"{name} {shown(share, '%')} of a batch" for name, share in one["share_of_batch"].items())
        yield Line(f"{graph}: million edges/s, one core", rates["blocks"] / 1e6, "")
        for pair, ratio in one["ratios"].items():
            peer = pair.split(" / ")[1]
            goal = NETWORKX_TIMES if peer == "NetworkX" else None
            yield Line(f"{graph}: {pair}", ratio, "x", f"{peer} {rates[peer] / 1e6:.3f} M edges/s", goal, eats=eats)


def training_lines(document: Document) -> Iterator[Line]:
    if steps := document.get("steps"):
        ours = steps["contenders"]["gemini_gnn"]
        yield Line("a training step, one thread", ours["step_s"], "s", parts_in_words(ours["phases_s"]))
        for pair, ratio in steps["ratios"].items():
            peer = pair.removesuffix(" / gemini_gnn")
            yield Line(
                f"times faster than {peer}",
                ratio,
                "x",
                f"{shown(steps['contenders'][peer]['step_s'], 's')}; batches from {steps['batches_from'][peer]}",
            )
    if precision := document.get("precision"):
        steps_s = {name: one["step_s"] for name, one in precision["contenders"].items()}
        share = steps_s["bf16_products"] / steps_s["gemini_gnn"]
        beside = f"{shown(steps_s['bf16_products'], 's')} beside {shown(steps_s['gemini_gnn'], 's')}"
        eats = parts_in_words(precision["contenders"]["bf16_products"]["phases_s"])
        yield Line("a step with bf16_products, of float32's", share, "%", beside, BF16_SHARE, most=True, eats=eats)
    if ranks := document.get("ranks"):
        for pair, ratio in ranks["ratios"].items():
            world = pair.split()[2]
            if world != "1":
                share = ranks["worlds"][world]["communication_fraction"]
                slower = shown(ranks["two_jobs_at_once"], "x")
                yield Line(
                    f"1 -> {world} ranks: times faster",
                    ratio,
                    "x",
                    f"work allows {shown(ranks['work_ratios'][pair], 'x')}; communication {shown(share, '%')}; "
                    f"two jobs at once: {slower}",
                    TWO_RANKS_TIMES if world == "2" else None,
                    eats="beyond half a step of one rank: " + parts_in_words(ranks["second_ranks_time_s"]),
                )


def features_lines(document: Document) -> Iterator[Line]:
    for graph, one in document["graphs"].items():
        dense, goals = one["contenders"]["dense"], document["goals"] if graph == "words" else {}
        for key, unit in (("epoch_s", "s"), ("remote_bytes", ""), ("memory_bytes", "")):
            what = f"{graph}: {key}, times less than dense"
            yield Line(what, one["ratios"][key], "x", f"dense {shown(dense[key], unit)}", goals.get(key))
        goal = 1.0 if graph == "computers" else None
        yield Line(f"{graph}: auto, times faster than dense", one["ratios"]["dense / auto"], "x", "", goal)
        peer = shown(one["contenders"]["PyG"]["epoch_s"], "s")
        yield Line(f"{graph}: 1 rank, times faster than PyG", one["ratios"]["PyG / sparse, 1 rank"], "x", peer)


def partitioning_lines(document: Document) -> Iterator[Line]:
    for graph, rows in document["rows"].items():
        ratios = document["ratios"][graph]
        yield Line(
            f"{graph}: edge cut of METIS",
            rows["metis"]["edge_cut"],
            "",
            f"hash {rows['hash']['edge_cut']:.3f}, pymetis {rows['pymetis']['edge_cut']:.3f}",
        )
        yield Line(
            f"{graph}: time of METIS by that of pymetis",
            ratios["time_metis_over_pymetis"],
            "x",
            f"{shown(rows['metis']['partition_s'], 's')}; pymetis {shown(rows['pymetis']['partition_s'], 's')}",
        )
        yield Line(f"{graph}: memory of METIS by that of pymetis", ratios["memory_metis_over_pymetis"], "x")


def cluster_lines(document: Document) -> Iterator[Line]:
    rows = document["aggregation"]
    largest = max(row["size_bytes"] for row in rows)
    for hosts, rate in dict.fromkeys((row["hosts"], row["rate"]) for row in rows):
        here = {r["contender"]: r for r in rows if (r["hosts"], r["rate"], r["size_bytes"]) == (hosts, rate, largest)}
        shares = {name: row["limit_s"] / row["seconds"] for name, row in here.items()}
        beside = ", ".join(f"{name} {shown(shares[name], '%')}" for name in ("ring", "parameter server", "send"))
        yield Line(
            f"all_reduce of {largest >> 20} MiB, {hosts} hosts at {rate}: share of the limit",
            shares["all_reduce"],
            "%",
            beside,
        )
    for disk in document["disks"]:
        yield Line(f"{disk['what']}: MB/s read", disk["read"] / 1e6, "", f"write {disk['write'] / 1e6:,.0f} MB/s")


def accuracy_lines(document: Document) -> Iterator[Line]:
    for graph, case in document["cases"].items():
        alone = ", ".join(f"{name} {value:.3f}" for name, value in case.items() if name.endswith("alone"))
        for name, values in case.items():
            if isinstance(values, list):
                goal = case["demanded"] if name.startswith("1 rank") else None
                mean = sum(values) / len(values)
                yield Line(
                    f"{graph}, {name}",
                    mean,
                    "",
                    f"seeds: {len(values)}, {min(values):.3f} to {max(values):.3f}. {alone}".strip(),
                    goal,
                )


def simulation_lines(document: Document) -> Iterator[Line]:
    rows = document["rows"]
    for name, machines in dict.fromkeys((row["failures"], row["machines"]) for row in rows):
        here = {row["scheme"]: row for row in rows if (row["failures"], row["machines"]) == (name, machines)}
        for scheme, row in here.items():
            if row["replicas"] == 2 and "ring" not in scheme:
                good = {label: here[label]["formula"]["goodput"] for label in ("NFS", "NFS, links") if label in here}
                beside = f"goodput {shown(row['formula']['goodput'], '%')}; " + ", ".join(
                    f"{label} {shown(one, '%')}" for label, one in good.items()
                )
                yield Line(
                    f"{machines:,} machines, {name}, {scheme}: wasted time, times less than NFS",
                    row["times"],
                    "x",
                    beside,
                )


def simulation_notes(document: Document) -> list[str]:
    lines = [f"- {name}: {one['value']:.4g} ({one['source']})" for name, one in document["costs"].items()]
    lines += [f"- failure rate {name}: {one['source']}" for name, one in document["failures"].items()]
    return ["What the simulation stands on:", "", *lines]


# --- plots ------------------------------------------------------------------------------------------------------------


def recovery_plot(document: Document, path: Path) -> None:
    import recovery

    known = {name: runs for name, runs in document["rows"].items() if name in recovery.ROWS}
    recovery.draw({name: [recovery.Measured(**run) for run in runs] for name, runs in known.items()}, path)


def cluster_plot(document: Document, path: Path) -> None:
    import cluster

    cluster.plot(document["aggregation"], path)


def simulation_plot(document: Document, path: Path) -> None:
    import simulation

    simulation.draw(document["rows"], path)


def snapshot_bars(document: Document) -> Contenders:
    names = {
        "snapshot": "stall_s",
        "memcpy": "memcpy_s",
        "async_save": "async_save_s",
        "save_checkpoint": "save_checkpoint_s",
        "lm-resiliency": "lm_resiliency_s",
    }
    stalls = document.get("stall", {}).values()
    groups = [
        (f"stall, {megabytes(one['bytes'])}", [(name, one[key]) for name, key in names.items() if key in one])
        for one in stalls
    ]
    if restore := document.get("restore"):
        groups.append((f"restore, {megabytes(restore['bytes'])}", list(restore["seconds"].items())))
    return groups


def replication_bars(document: Document) -> Contenders:
    groups = [
        (f"copy {megabytes(row['bytes'])}, {row['rate']}", list(row["seconds"].items()))
        for row in document.get("push", [])
    ]
    if restore := document.get("restore"):
        groups.append((f"restore {megabytes(restore['bytes'])}, 1gbit", list(restore["seconds"].items())))
    for row in document.get("loss", []):
        steps = [(name, row[name]["step_s"]) for name in ("one copy", "two, interleaved", "two, at any time")]
        groups.append((f"step, {megabytes(row['bytes'])} per rank, {row['rate']}", steps))
    return groups


def sampling_bars(document: Document) -> Contenders:
    return [
        (graph, [(name, each["batch_s"]) for name, each in one["contenders"].items()])
        for graph, one in document["graphs"].items()
    ]


def training_bars(document: Document) -> Contenders:
    groups = []
    if steps := document.get("steps"):
        groups.append(("a step", [(name, one["step_s"]) for name, one in steps["contenders"].items()]))
    if ranks := document.get("ranks"):
        groups.append(("an epoch", [(f"{world} ranks", one["epoch_s"]) for world, one in ranks["worlds"].items()]))
    return groups


def features_bars(document: Document) -> Contenders:
    return [
        (f"an epoch of {graph}", [(name, run["epoch_s"]) for name, run in one["contenders"].items()])
        for graph, one in document["graphs"].items()
    ]


def partitioning_bars(document: Document) -> Contenders:
    return [
        (graph, [(name, row["partition_s"]) for name, row in rows.items()]) for graph, rows in document["rows"].items()
    ]


def draw_bars(groups: Contenders, path: Path) -> None:
    """Seconds of the contenders, a block per group; ours in another colour."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(9, 0.6 + sum(0.45 + 0.26 * len(bars) for _, bars in groups)), dpi=100, layout="constrained"
    )
    rows = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[1 + len(bars) for _, bars in groups])[:, 0]
    for axes, (label, bars) in zip(rows, groups, strict=True):
        names, values = zip(*bars, strict=True)
        axes.barh(range(len(bars)), values, color=[BLUE if name in OURS else GREY for name in names], height=0.7)
        for at, value in enumerate(values):
            axes.annotate(shown(value, "s"), (value, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(bars)), names, fontsize=8, parse_math=False)
        axes.set_title(label, fontsize=9, loc="left", parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(0, max(values) * 1.15)
        axes.grid(alpha=0.25, axis="x")
    rows[-1].set_xlabel("seconds")
    figure.savefig(path)


def draw_goals(lines: Sequence[tuple[str, Line]], path: Path) -> None:
    """Each line that has a goal, by how far it is on the good side of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.24 * len(lines)), dpi=100, layout="constrained")
    axes = figure.subplots()
    for at, (_, line) in enumerate(lines):
        assert line.goal is not None
        good = 1.0  # a loss of throughput may be below 0, in the noise
        if line.value > 0:
            good = min(max(line.goal / line.value if line.most else line.value / line.goal, 0.01), 100)
        axes.plot([1, good], [at, at], "o-", color=GREEN if line.met else RED, linewidth=4, markersize=4)
        text = f"{shown(line.value, line.unit)} ({'<=' if line.most else '>='} {shown(line.goal, line.unit)})"
        axes.annotate(text, (max(good, 1), at), (5, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(lines)), [f"{name}: {line.what}" for name, line in lines], fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xscale="log", xlabel="times better than the goal (left of the line: missed)")
    axes.grid(alpha=0.25, axis="x")
    figure.savefig(path)


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    lines: Callable[[Document], Iterator[Line]]
    bars: Callable[[Document], Contenders] | None = None
    plot: Callable[[Document, Path], None] | None = None
    notes: Callable[[Document], list[str]] | None = None


SECTIONS = {
    "recovery": Section(recovery_lines, plot=recovery_plot, notes=recovery_notes),
    "replication": Section(replication_lines, replication_bars),
    "snapshot": Section(snapshot_lines, snapshot_bars),
    "simulation": Section(simulation_lines, plot=simulation_plot, notes=simulation_notes),
    "sampling": Section(sampling_lines, sampling_bars),
    "training": Section(training_lines, training_bars),
    "features": Section(features_lines, features_bars),
    "partitioning": Section(partitioning_lines, partitioning_bars),
    "cluster": Section(cluster_lines, plot=cluster_plot),
    "accuracy": Section(accuracy_lines),
}


def age(name: str, machine: Document) -> str:
    """Whether the code has changed since the commit of a result, in words."""
    commit = machine.get("commit")
    if not commit:
        return "**OLD?** no commit in the JSON"
    dirty = ", with changes that no commit has" if commit.endswith("-dirty") else ""
    code = ["gemini_gnn", "benchmarks/common.py", f"benchmarks/{name}.py"]
    since = git("rev-list", "--count", f"{commit.removesuffix('-dirty')}..HEAD", "--", *code)
    if since is None:
        return f"**OLD?** git does not know {commit}"
    if since != "0":
        return f"**OLD** commits to this code since then: {since}{dirty}"
    return f"this code{dirty}"


def purpose(name: str) -> str:
    """The first paragraph of the benchmark's own words; it is not imported for that."""
    words = ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())) or ""
    return " ".join(words.split("\n\n")[0].split())


def section(name: str, path: Path, plots: Path) -> tuple[list[str], list[Line], str]:
    """The text of one benchmark, its lines, and its line of the first table. Draws its plots into ``plots``."""
    text = [f"## {name}", "", purpose(name), ""]
    if not path.exists():
        words = f"not measured here: run `python benchmarks/{name}.py`"
        return [*text, f"{words[0].upper()}{words[1:]}.", ""], [], f"| {name} | {words} | | | |"
    try:
        document = json.loads(path.read_text())
        machine, one = document["machine"], SECTIONS[name]
        lines = list(one.lines(document))
        text += [
            *origin(name, document),
            "",
            "| measured | | beside it, in the same run | goal | |",
            "|---|---|---|---|---|",
        ]
        text += [line.row() for line in lines] + [""]
        missed = [line for line in lines if line.met is False]
        none = "the JSON has no parts of it"
        text += [f"- {line.what}: missed. Most of it: {line.eats or none}." for line in missed] + (
            [""] if missed else []
        )
        text += [*one.notes(document), ""] if one.notes else []
        if one.plot:
            one.plot(document, plots / f"{name}.png")
        elif one.bars and (groups := one.bars(document)):
            draw_bars(groups, plots / f"{name}.png")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        words = f"{path.name} does not fit this report ({type(error).__name__}: {error}): run the benchmark again"
        return [*text, f"**{words}.**", ""], [], f"| {name} | {words} | | | |"
    if (plots / f"{name}.png").exists():
        text += [f"![{name}]({plots.name}/{name}.png)", ""]
    met = sum(line.met is True for line in lines)
    goals = f"{met} met, {len(missed)} missed" if met or missed else "no goals"
    goals += ", **quick sizes**" if "--quick" in (machine.get("command") or "") else ""
    return (
        text,
        lines,
        f"| [{name}](#{name}) | {goals} | {machine['date']} | {machine.get('commit') or '?'} | {age(name, machine)} |",
    )


def origin(name: str, document: Document) -> list[str]:
    machine = document["machine"]
    load = f"load {machine['load_1min']:.1f} at the beginning"
    if "load_1min_at_end" in document:
        load += f", {document['load_1min_at_end']:.1f} at the end"
    return [
        f"- command: `{machine.get('command') or f'python benchmarks/{name}.py ...'}`",
        f"- machine: {machine['cpu']}, cores: {machine['cores']}, {machine['memory_bytes'] / 2**30:.0f} GiB, {load}",
        f"- measured {machine['date']}, commit {machine.get('commit') or 'unknown'}: {age(name, machine)}",
    ]


def report(results: Path, output: Path) -> str:
    """The page; its plots are drawn into the folder beside ``output`` that has its name."""
    plots = output.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.png"):
        old.unlink()
    sections, table, goals = [], [], []
    for name in SECTIONS:
        text, lines, row = section(name, results / f"{name}.json", plots)
        sections += text
        table.append(row)
        goals += [(name, line) for line in lines if line.goal is not None]
        print(row, flush=True)
    if goals:
        draw_goals(goals, plots / "goals.png")
    head = [
        "# Measured",
        "",
        f"Made by `python benchmarks/report.py` on {time.strftime('%Y-%m-%d', time.gmtime())}, at commit "
        f"{git('describe', '--always', '--dirty', '--abbrev=12', '--exclude=*')}. Nothing here is written by hand.",
        "Ratios and goals are of one run each: the peer ran in turns with this project, on the same machine.",
        "",
        "| benchmark | goals | measured | commit | the code |",
        "|---|---|---|---|---|",
        *table,
        "",
        *([f"![goals]({plots.name}/goals.png)", ""] if goals else []),
    ]
    return "\n".join([*head, *sections])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder with the JSON of the benchmarks")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "report.md")
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(
            f"--results {options.results}: expected a folder with the JSON of benchmarks; run a benchmark first"
        )
    page = report(options.results, options.output)
    options.output.write_text(page)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
