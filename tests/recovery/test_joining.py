"""Which machines may join a job, and where they look for its root: pure. The rest is in tests/cluster/test_hosts_join.py."""

import pytest

from gemini_gnn.compose import of_living_run
from gemini_gnn.config import Config
from gemini_gnn.errors import ConfigError
from gemini_gnn.observe.run_directory import RunDir
from gemini_gnn.recovery import joining

TERM = {"term": 2, "machine": "h0", "address": "10.0.0.1", "port": 29500, "code": "sources a"}


@pytest.mark.parametrize(
    ("term", "status", "said"),
    [
        ({}, {}, "no job has begun in run"),
        (TERM, {"term": 2, "state": "done"}, "has ended (done)"),
        ({"term": 2, "machine": "h0", "code": "sources a"}, {}, "runs on one machine, h0"),
        (TERM | {"code": "sources b"}, {}, "expected sources b; got sources a"),
        ({name: TERM[name] for name in TERM if name != "code"}, {}, "expected an older version; got sources a"),
    ],
)
def test_a_machine_that_cannot_join(term, status, said):
    assert said in joining.why_not("run", term, status, "sources a")


@pytest.mark.parametrize("status", [{}, {"term": 1, "state": "stopped"}, {"term": 2, "state": "waiting"}])
def test_a_machine_that_can_join(status):
    assert joining.why_not("run", TERM, status, "sources a") == ""


def test_a_machine_that_is_about_to_become_root_is_found():
    machines = [("10.0.0.1", 29500), ("10.0.0.2", 4711), (None, None)]
    status = {"machines": [{"address": address, "port": port} for address, port in machines]}
    assert joining.targets(TERM, status) == [("10.0.0.1", 29500), ("10.0.0.2", 4711)]


def test_only_where_a_machines_own_files_lie_may_be_said(tmp_path):
    RunDir.claim(Config(run_dir=str(tmp_path), seed=7)).release()
    config = of_living_run([f"run_dir={tmp_path}", "dataset.root=/mine", "snapshot.arena=/ram"])
    assert (config.seed, config.dataset.root, config.snapshot.arena) == (7, "/mine", "/ram")
    for wrong in ([], [f"run_dir={tmp_path}", "seed=8"], [f"run_dir={tmp_path}", "dataset.root="]):
        with pytest.raises(ConfigError, match="--join: expected run_dir=RUN_DIR of a living job"):
            of_living_run(wrong)
