"""The page that benchmarks/report.py makes of the JSON of the others: small samples of what they write."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import common
import recovery
import report
import simulation

BENCHMARKS = Path(report.__file__).parent
HERE = {
    "cpu": "EPYC",
    "cores": 2,
    "memory_bytes": 24 << 30,
    "load_1min": 0.5,
    "date": "2026-01-02T03:04:05Z",
    "commit": None,
    "command": "python benchmarks/some.py --rounds 5",
}


def measured(counted_s, restore_s):
    return [asdict(recovery.Measured(counted_s + 0.5, counted_s, 1, {"fork": 0.05, "restore": restore_s}))] * 3


def lost_machine():
    parts = {"detect": 1.5, "restore": 0.5}
    ours = recovery.Sized(10_000_000, "1gbit", 0.5, 0.0, 0.5, 0.5, 0.5, 2.0, 1, parts)
    theirs = recovery.Sized(10_000_000, "1gbit", 0.5, 2.0, 600.0, 2.0, 4.0, 20.0, 3, {})
    return recovery.compared(ours, theirs, 120_000_000, 86_400.0)


def stall(nbytes, memcpy_s):
    seconds = {"stall_s": 0.0004, "memcpy_s": memcpy_s, "async_save_s": 0.05, "save_checkpoint_s": 0.2}
    return seconds | {"bytes": nbytes, "ratios": {"stall / memcpy": 0.0004 / memcpy_s, "async_save / stall": 125.0}}


def loss(step_s, lost):
    return {"step_s": step_s, "lost": lost, "every": 1.0, "replicators_cpu_s": 0.012}


def steps(step_s):
    return {"step_s": step_s, "phases_s": {"forward": 0.25, "backward": 0.5}}


def epochs(seconds):
    return {"epoch_s": seconds, "remote_bytes": 2e9, "memory_bytes": 4e8}


def partition(cut, seconds):
    return {"edge_cut": cut, "partition_s": seconds}


def aggregated(contender, seconds):
    return {
        "contender": contender,
        "hosts": 4,
        "rate": "1gbit",
        "size_bytes": 64 << 20,
        "seconds": seconds,
        "limit_s": 0.8,
    }


def simulated():
    failures = {"opt": asdict(simulation.FAILURES["opt"])}
    costs, sources = simulation.costs_of({}, {})
    rows = [asdict(row) for row in simulation.rows_of(["opt"], [16, 64], [1, 2], costs, 50, 0)]
    said = {name: {"value": value, "source": sources[name]} for name, value in asdict(costs).items()}
    return {"costs": said, "failures": failures, "rows": rows}


CONTENDERS = {
    name: {"edges_per_s": rate, "batch_s": 1e5 / rate}
    for name, rate in {"blocks": 25e6, "blocks beside NetworkX": 25e6, "NetworkX": 0.5e6}.items()
}
SAMPLES = {
    "recovery": {
        "rows": {"trainer": measured(0.5, 0.4), "agent": measured(0.25, 0.1), "checkpoint": measured(8.0, 1.0)},
        "counted_s": {"trainer": 0.5, "agent": 0.25, "checkpoint": 8.0},
        "idle_cpu": {"agent": 0.03},
        "by_bytes": {"rows": [lost_machine()], "skipped": ["1000 MB per rank do not fit"]},
    },
    "replication": {
        "push": [
            {
                "rate": "1gbit",
                "bytes": 200_000_000,
                "seconds": {"push": 2.0, "bare socket": 1.8, "both at once": 2.2, "lm-resiliency": 4.4},
                "ratios": {"push / bare socket": 0.9, "lm-resiliency / both at once": 2.0},
            }
        ],
        "restore": {
            "bytes": 10**9,
            "seconds": {"fetch": 9.0, "attach": 1.0, "load_checkpoint": 12.0, "load_checkpoint, 4 hosts": 45.0},
            "ratios": {
                "share of the link": 0.89,
                "load_checkpoint / ours": 1.2,
                "load_checkpoint, 4 hosts / ours": 4.5,
            },
        },
        "loss": [
            {
                "rate": "1gbit",
                "bytes": 10**7,
                "one copy": loss(0.5, 0.0),
                "two, interleaved": loss(0.51, 0.02),
                "two, at any time": loss(0.502, 0.004),
            }
        ],
        "compress": [
            {
                "dataset": "cora",
                "codecs": [{"of": "the state", "codec": "lz4", "ratio": 0.95, "gains": {"1000000000.0": 1.05}}],
            }
        ],
    },
    "snapshot": {
        "stall": {"10000000": stall(10**7, 0.001), "1000000000": stall(10**9, 0.09)},
        "restore": {
            "bytes": 10**9,
            "seconds": {"memory": 0.6, "load_checkpoint": 1.5, "weights_only": 1.4},
            "ratios": {"load_checkpoint / memory": 2.5},
        },
        "loss": {
            "world_size": 2,
            "step_with_s": 0.6,
            "step_without_s": 0.6,
            "stall_per_snapshot_s": 0.0004,
            "ratios": {"loss of throughput": -0.007},
        },
        "load_1min_at_end": 1.5,
    },
    "simulation": simulated(),
    "sampling": {
        "graphs": {
            "ego-twitter": {
                "contenders": CONTENDERS,
                "ratios": {"blocks / NetworkX": 50.0},
                "share_of_batch": {"transposes": 0.25},
            }
        }
    },
    "training": {
        "steps": {
            "contenders": {"gemini_gnn": steps(0.75), "PyG": steps(9.0)},
            "ratios": {"PyG / gemini_gnn": 12.0},
            "batches_from": {"PyG": "NeighborLoader"},
        },
        "precision": {"contenders": {"gemini_gnn": steps(0.75), "bf16_products": steps(0.5)}},
        "ranks": {
            "worlds": {n: {"epoch_s": 2.0 / int(n), "communication_fraction": 0.01} for n in ("1", "2")},
            "ratios": {"1 / 1 ranks": 1.0, "1 / 2 ranks": 1.8},
            "work_ratios": {"1 / 1 ranks": 1.0, "1 / 2 ranks": 1.9},
            "two_jobs_at_once": 1.1,
            "second_ranks_time_s": {"more work: less overlap": 0.04, "forward, backward": 0.02},
        },
    },
    "features": {
        "goals": {"epoch_s": 8.0, "remote_bytes": 30.0, "memory_bytes": 10.0},
        "graphs": {
            "words": {
                "contenders": {"dense": epochs(9.0), "sparse": epochs(1.5), "PyG": {"epoch_s": 3.0}},
                "ratios": {"epoch_s": 6.0, "remote_bytes": 40.0, "memory_bytes": 12.0}
                | {"dense / auto": 6.0, "PyG / sparse, 1 rank": 1.5},
            }
        },
    },
    "partitioning": {
        "rows": {
            "cora": {"hash": partition(0.75, 0.1), "pymetis": partition(0.08, 0.4), "metis": partition(0.07, 0.3)}
        },
        "ratios": {"cora": {"time_metis_over_pymetis": 0.75, "memory_metis_over_pymetis": 0.8}},
    },
    "cluster": {
        "aggregation": [
            aggregated(name, 1.0) for name in ("all_reduce", "ring", "parameter server", "all_to_all", "pairs", "send")
        ],
        "disks": [{"what": "/dev/shm", "read": 4e9, "write": 2e9}],
    },
    "accuracy": {"cases": {"cora": {"demanded": 0.8, "1 ranks, metis": [0.79, 0.8], "2 ranks, hash": [0.7]}}},
}
SEEN = {
    "recovery": [
        "| 2 ranks: a trainer killed | 0.50 s | 1.00 s in all, 1 steps done again | <= 0.30 s | **MISSED** |",
        "- 2 ranks: a trainer killed: missed. Most of it: restore 0.40 s, fork 50 ms.",
        "| 2 ranks: the agent killed: times faster | 32.0x | 8.00 s checkpoint | >= 15.0x | met |",
        "10 MB per rank at 1gbit: recovery, times less | 10.0x | 2.00 s; checkpoints 20.00 s | >= 15.0x | **MISSED** |",
        "recovery, times less: missed. Most of it: detect 1.50 s, restore 0.50 s.",
        "10 MB per rank at 1gbit: wasted, times less | 117x | 2.75 s; checkpoints 322.00 s | >= 13.0x | met |",
        "| the busiest agent without traffic: CPU time, of a core | 3.0 % |  | <= 2.0 % | **MISSED** |",
        "- skipped: 1000 MB per rank do not fit",
    ],
    "replication": [
        "| a copy of 200 MB over 1gbit: share of a bare socket | 90 % | 2.00 s; bare socket 1.80 s | >= 80 % | met |",
        "from a peer: times faster than load_checkpoint: missed. Most of it: fetch 9.00 s, attach 1.00 s.",
        "two, interleaved: missed. Most of it: replicators 12 ms of CPU time per step.",
    ],
    "snapshot": [
        "load 0.5 at the beginning, 1.5 at the end",
        "stall of 0.4 ms; the goal allows 0.02 ms",
        "| restore 1,000 MB: times faster | 2.5x |",
        "| throughput lost, a snapshot per step | -0.7 % |",
    ],
    "simulation": ["16 machines, opt, m=2, group", "ASSUMED: a standby waits", "logbook of OPT-175B"],
    "sampling": ["| ego-twitter: blocks / NetworkX | 50.0x | NetworkX 0.500 M edges/s | >= 100x | **MISSED** |"],
    "training": [
        "| times faster than PyG | 12.0x | 9.00 s; batches from NeighborLoader |",
        "| a step with bf16_products, of float32's | 67 % | 0.50 s beside 0.75 s | <= 60 % | **MISSED** |",
        "| 1 -> 2 ranks: times faster | 1.8x | work allows 1.9x; communication 1.0 %; two jobs at once: 1.1x |",
    ],
    "features": [
        "| words: epoch_s, times less than dense | 6.0x | dense 9.00 s | >= 8.0x | **MISSED** |",
        "| words: remote_bytes, times less than dense | 40.0x | dense 2,000,000,000 | >= 30.0x | met |",
    ],
    "partitioning": ["| cora: edge cut of METIS | 0.070 | hash 0.750, pymetis 0.080 |"],
    "cluster": ["64 MiB, 4 hosts at 1gbit: share of the limit | 80 % |", "| /dev/shm: MB/s read | 4,000 |"],
    "accuracy": ["| cora, 1 ranks, metis | 0.795 |", "| >= 0.800 | **MISSED** |", "| cora, 2 ranks, hash | 0.700 |"],
}


def page_of(folder, **documents):
    results = folder / "results"
    results.mkdir()
    for name, document in documents.items():
        (results / f"{name}.json").write_text(json.dumps({"machine": HERE} | document))
    return report.report(results, folder / "report.md")


def part(page, name):
    return page.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_every_benchmark_that_writes_json_has_a_section():
    writers = {path.stem for path in BENCHMARKS.glob("*.py") if "write(" in path.read_text() and path.stem != "common"}
    assert writers - {"report", "replication_host"} == report.SECTIONS.keys() == SAMPLES.keys() == SEEN.keys()


def test_all_benchmarks_on_one_page(tmp_path):
    page = page_of(tmp_path, **SAMPLES)
    for name, words in SEEN.items():
        for word in [*words, "- command: `python benchmarks/some.py --rounds 5`", "EPYC, cores: 2, 24 GiB"]:
            assert word in part(page, name)
    assert "does not fit" not in page and "not measured" not in page
    pictures = {path.stem: path for path in (tmp_path / "report").glob("*.png")}
    assert pictures.keys() == SAMPLES.keys() - {"accuracy"} | {"goals"}
    for name, path in pictures.items():
        assert f"![{name}](report/{name}.png)" in page and imread(path).shape[1] > 500


def test_without_json_the_command_is_named(tmp_path):
    page = page_of(tmp_path)
    for name in SAMPLES:
        assert f"Not measured here: run `python benchmarks/{name}.py`." in part(page, name)
    assert "![" not in page


def test_a_part_that_was_not_run_is_left_out(tmp_path):
    page = page_of(tmp_path, replication={"compress": []}, snapshot={"loss": SAMPLES["snapshot"]["loss"]}, training={})
    assert "does not fit" not in page and "stall per snapshot" not in page


def test_json_of_another_release_is_named_and_the_rest_is_there(tmp_path):
    page = page_of(tmp_path, recovery={"rows": {}}, accuracy=SAMPLES["accuracy"])
    assert "**recovery.json does not fit this report (KeyError: 'counted_s'): run the benchmark again.**" in page
    assert "cora, 1 ranks" in page


def test_pictures_of_an_older_report_do_not_stay(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "recovery.png").write_bytes(b"old")
    assert "![recovery]" not in page_of(tmp_path, accuracy=SAMPLES["accuracy"])
    assert not (tmp_path / "report" / "recovery.png").exists()


def test_a_quick_run_is_called_quick(tmp_path):
    machine = HERE | {"command": "python benchmarks/accuracy.py --quick"}
    assert "1 missed, **quick sizes** |" in page_of(tmp_path, accuracy=SAMPLES["accuracy"] | {"machine": machine})


# How old a result is


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository in which only the code of sampling.py has changed since the first commit."""
    monkeypatch.setattr(common, "ROOT", tmp_path)

    def commit(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for words in (["add", "."], [*who, "commit", "-qm", name]):
            subprocess.run(["git", *words], cwd=tmp_path, check=True, timeout=30)
        return common.git("rev-parse", "HEAD")

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True, timeout=30)
    first = commit("gemini_gnn/a.py")
    commit("benchmarks/sampling.py")
    return first


@pytest.mark.parametrize(
    ("name", "suffix", "words"),
    [
        ("sampling", "", "**OLD** commits to this code since then: 1"),
        ("training", "", "this code"),
        ("training", "-dirty", "this code, with changes that no commit has"),
    ],
)
def test_a_result_is_old_if_its_code_has_changed(repository, name, suffix, words):
    assert report.age(name, {"commit": repository + suffix}) == words


def test_a_result_without_a_known_commit_may_be_old(repository):
    assert report.age("training", {}) == "**OLD?** no commit in the JSON"
    assert report.age("training", {"commit": "123456789abc"}) == "**OLD?** git does not know 123456789abc"


def test_the_head_of_a_result_says_commit_and_command(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/sampling.py", "--clock", "cpu time"])
    head = common.machine()
    assert head["command"] == "python benchmarks/sampling.py --clock 'cpu time'"
    assert common.git("rev-parse", "HEAD").startswith(head["commit"]) and len(head["commit"]) == 12
    (tmp_path / "gemini_gnn" / "a.py").write_text("changed")
    assert common.machine()["commit"].endswith("-dirty")
    monkeypatch.setattr(common, "ROOT", Path("/proc"))  # no repository
    assert common.machine()["commit"] is None


@pytest.mark.parametrize(
    ("value", "goal", "most", "met"),
    [(1.0, 2.0, True, True), (3.0, 2.0, True, False), (3.0, 2.0, False, True), (1.0, 2.0, False, False)],
)
def test_a_goal_is_a_limit_from_above_or_from_below(value, goal, most, met):
    assert report.Line("", value, "x", goal=goal, most=most).met is met
    assert report.Line("", value, "x").met is None
