"""Where the costs of benchmarks/simulation.py come from, and the table, JSON and picture that it makes of them."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import simulation


def run(counted_s, **parts):
    return {"counted_s": counted_s, "parts": parts}


RECOVERY = {
    "rows": {
        "lab-trainer": [run(0.9, restore=0.1), run(0.8, restore=0.1), run(2.0, restore=0.1)],
        "lab-checkpoint": [run(18.0, restore=1.0, **{"steps again": 2.0})],
    },
    "counted_s": {},
}
REPLICATION = {
    "push": [
        {"rate": "1gbit", "bytes": 200, "seconds": {"push": 2.0}},
        {"rate": "10gbit", "bytes": 200, "seconds": {"push": 0.5}},
        {"rate": "loopback", "bytes": 200, "seconds": {"push": 0.1}},
    ],
    "restore": {"bytes": 1000, "seconds": {"attach": 0.5, "load_checkpoint, 4 hosts": 40.0}},
    "loss": [{"two, interleaved": {"lost": -0.01}}, {"two, interleaved": {"lost": 0.03}}],
}


def test_costs_are_what_was_measured_and_the_rest_is_said_to_be_assumed():
    costs, sources = simulation.costs_of(
        simulation.measured({"r.json": RECOVERY, "p.json": REPLICATION}), {"step_s": 2}
    )
    assert (costs.process_s, costs.relaunch_s) == (pytest.approx(0.8), pytest.approx(15.0))
    assert (costs.link_bytes_s, costs.memory_bytes_s, costs.storage_bytes_s) == (400, 2000, 100)
    assert (costs.slowdown, costs.machine_s, costs.step_s) == (pytest.approx(0.01), pytest.approx(2.3), 2)
    assert sources["process_s"] == "measured, r.json: lab-trainer without restore"
    assert sources["link_bytes_s"] == "measured, p.json: push over 10gbit"
    assert sources["machine_s"].startswith("ASSUMED") and sources["persist_s"].startswith("ASSUMED")
    assert sources["step_s"] == "given by --cost"


def test_a_lost_machine_costs_what_its_row_says():
    rows = RECOVERY["rows"] | {"lab-machine": [run(2.4, restore=0.2)]}
    costs, sources = simulation.costs_of(simulation.measured({"r.json": {"rows": rows, "counted_s": {}}}), {})
    assert costs.machine_s == pytest.approx(2.2) and sources["machine_s"].endswith("lab-machine without restore")


def test_json_of_other_benchmarks_says_nothing():
    assert simulation.measured({"c.json": {"aggregation": []}, "p.json": {"rows": {"cora": {}}}}) == {}


@pytest.mark.parametrize("text", ["stepp_s=1", "step_s", "step_s=x", "step_s=0", "slowdown=-1"])
def test_a_cost_that_is_none_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected NAME=NUMBER, above 0, with a name of link_bytes_s"):
        simulation.given([text])


@pytest.mark.parametrize(("value", "words"), [(None, "-"), (1.0, "100 %"), (0.0, "0 %"), (1 - 1e-9, "99.99 %")])
def test_only_what_is_certain_is_called_so(value, words):
    assert simulation._share(value) == words


def test_the_command_writes_a_table_a_json_and_a_picture(tmp_path, monkeypatch, capsys):
    (tmp_path / "recovery.json").write_text(json.dumps(RECOVERY))
    words = ["--machines", "16", "17", "--replicas", "1", "2", "--many", "200", "--failures", "opt", "llama"]
    words += ["--measured", str(tmp_path / "recovery.json"), "--output", str(tmp_path / "simulation.json")]
    monkeypatch.setattr(sys, "argv", ["simulation.py", *words])
    simulation.main()
    said = capsys.readouterr().out
    assert "measured, recovery.json: lab-trainer" in said and "ASSUMED" in said and "419 unexpected" in said
    found = json.loads((tmp_path / "simulation.json").read_text())
    rows = {(row["failures"], row["machines"], row["scheme"]): row for row in found["rows"]}
    assert rows["opt", 16, "m=2, group"]["survives"] == pytest.approx([14 / 15, 0.8])
    assert rows["opt", 17, "m=2, mixed"]["times"] > rows["opt", 17, "NFS, links"]["times"] > 1
    assert rows["llama", 16, "m=2, ring"]["kept"] < rows["llama", 16, "m=2, group"]["kept"] < 1
    assert found["costs"]["process_s"]["value"] == pytest.approx(0.8)
    assert imread(tmp_path / "simulation.png").shape[0] > 500
