"""The failures of a run, for later terms and for the result."""

import json

from gemini_gnn.config import from_mapping
from gemini_gnn.observe import terms
from gemini_gnn.observe.failures import FAILURES, add_to_result, read_failures
from gemini_gnn.observe.run_directory import RunDir
from gemini_gnn.recovery.root.accounting import Observed, record, totals
from gemini_gnn.recovery.worker.journal import Journal
from tests.recovery.jobs import PATIENCE_S

ONE, TWO = (
    record(Observed("killed", "why", term, 1, 0.0, step=9, failed_s=5.0, seen_s=5.5, stepped_s=6.0, restored_step=7))
    for term in (1, 2)
)


def test_a_later_term_reads_the_failures_of_earlier_ones(tmp_path):
    assert read_failures(tmp_path) == []
    terms.make_run_dir(tmp_path)
    for failure in (ONE, TWO):
        journal = Journal(tmp_path, "m")
        journal.failure(failure)
        assert journal.close(PATIENCE_S)
    assert read_failures(tmp_path) == [ONE, TWO]


def test_a_line_that_was_cut_is_left_out(tmp_path):
    line = json.dumps(ONE)
    for cut in ("\n", line[:20], "[]\n", line[:-1] + "\n", "\xff\n"):
        (tmp_path / FAILURES).write_text(f"{line}\n{cut}")
        assert read_failures(tmp_path) == [ONE]


def test_the_result_names_the_failures_and_what_they_cost(tmp_path):
    cost = totals([ONE, TWO], began_s=0.0, now=100.0, step_s=0.5)
    assert not add_to_result(tmp_path, [ONE, TWO], cost) and not (tmp_path / "result.json").exists()
    (tmp_path / "result.json").write_text(json.dumps({"steps": 40}))
    for _ in range(2):
        assert add_to_result(tmp_path, [ONE, TWO], cost)
        assert json.loads((tmp_path / "result.json").read_text()) == {
            "steps": 40,
            "failures": [ONE, TWO],
            "goodput": 0.97,
            "recovery_total_s": 2.0,
            "lost_work_s": 1.0,
        }
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_without_failures_the_result_says_so(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"steps": 40}))
    assert add_to_result(tmp_path, [], totals([], began_s=0.0, now=100.0, step_s=0.5))
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["failures"], result["goodput"], result["recovery_total_s"]) == ([], 1.0, 0.0)


def test_a_run_that_starts_over_has_no_failures_of_the_run_before(tmp_path):
    config = from_mapping({"run_dir": str(tmp_path)})
    (tmp_path / "losses.csv").write_text("step,epoch,loss\n1,1,0.5\n")
    (tmp_path / FAILURES).write_text(json.dumps(ONE) + "\n")
    RunDir.claim(config).release()
    assert read_failures(tmp_path) == [ONE]
    RunDir.claim(config, anew=True).release()
    assert read_failures(tmp_path) == [] and json.loads((tmp_path / "failures.1.jsonl").read_text()) == ONE
