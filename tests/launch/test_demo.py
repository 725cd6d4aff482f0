"""`launch/demo.sh`: a machine is lost, the losses are those of an undisturbed run, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab import missing

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import demo  # noqa: E402

needs_lab = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def start(folder, *words):
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    environment |= {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    environment.pop("DISPLAY", None)
    command = ["bash", "launch/demo.sh", *words, f"run_dir={folder / 'run'}", f"dataset.cache={folder / 'cache'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def left(folder):
    """Processes of the lab or the job, and folders of the lab."""
    found = [str(path) for path in folder.glob("demo-*")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(folder) in words:
                found.append(words)
    return found


@pytest.mark.long
@pytest.mark.lab
@pytest.mark.processes
@needs_lab
@pytest.mark.parametrize("root", [(), ("root",)], ids=["a machine", "the root's"])
def test_a_lost_machine_changes_no_bit(short_path, root):
    process = start(short_path, *root)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    assert "the losses of all 60 steps are bit-identical" in said and "the parameters are bit-identical" in said
    lost = "h0" if root else "h2"
    assert f">>> power off {lost}" in said and "failures: 0" in said and "failures: 1" in said
    for picture in ("losses.png", "failures.png"):
        assert (short_path / "run" / picture).stat().st_size > 10_000
    assert not left(short_path)


@pytest.mark.long
@pytest.mark.lab
@pytest.mark.processes
@needs_lab
def test_ctrl_c_leaves_nothing(short_path):
    process = start(short_path)
    said = ""
    while "launch/train.py" not in said:
        said += process.stdout.readline() or pytest.fail(said)
    deadline = time.monotonic() + 60
    while not any("recovery.worker.agent" in words for words in left(short_path)):
        assert time.monotonic() < deadline and process.poll() is None, "no agent"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0, said + rest
    assert not left(short_path)


def test_without_hosts_it_names_the_other_script(monkeypatch, capsys):
    monkeypatch.setattr(demo, "missing", lambda: "the lab needs root")
    assert demo.main([]) == 2
    assert capsys.readouterr().err == "error: the lab needs root; without hosts type: bash launch/quickstart.sh\n"


def test_the_first_new_step_is_counted_from_the_last_one_before():
    events = [{"kind": "start", "t": 0.0}, *({"kind": "step", "t": t, "step": t} for t in (1, 2))]
    with pytest.raises(SystemExit, match="no step was left to do"):
        demo.resumed(events)
    again = [{"kind": "start", "t": 4.0}, {"kind": "step", "t": 5, "step": 2}]
    with pytest.raises(SystemExit, match="no step was left to do"):
        demo.resumed([*events, *again])
    found = demo.resumed([*events, *again, {"kind": "step", "t": 6, "step": 3}])
    assert found == (2, 6, [(1, 1), (2, 2), (5, 2), (6, 3)])
