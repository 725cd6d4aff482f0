"""Cutting a link: which device, what it needs, and that it comes up again; ``ip`` is a script here, the lab has the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import link
from gemini_gnn.recovery import processes


def test_the_device_that_has_an_address():
    assert link.device_to("127.0.0.1") == "lo"
    with pytest.raises(ConfigError, match="cut-link: .* has no way to"):
        link.device_to("no.such.host.invalid")


def test_what_it_needs(monkeypatch):
    with pytest.raises(ConfigError, match="several machines"):
        link.check("cut-link", 1)
    monkeypatch.setattr(link, "may", lambda capability: False)
    monkeypatch.setattr(link.shutil, "which", lambda name: "/usr/sbin/ip")
    with pytest.raises(ConfigError, match="CAP_NET_ADMIN"):
        link.check("split", 2)
    monkeypatch.setattr(link, "may", lambda capability: True)
    link.check("split", 2)
    monkeypatch.setattr(link.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="apt-get install iproute2"):
        link.check("split", 2)


def test_it_comes_up_again_whatever_signal_comes_and_however_often_that_fails(tmp_path, monkeypatch):
    script = tmp_path / "ip"
    script.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/said\ntest "$(wc -l < {tmp_path}/said)" != 2\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begin = time.monotonic()
    pid = link.cut("eth7", 0.2)
    while not (tmp_path / "said").exists():
        assert time.monotonic() - begin < 20
        time.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "said").read_text().splitlines() == ["link set dev eth7 down"] + 2 * ["link set dev eth7 up"]
    assert os.getsid(0) != pid and time.monotonic() - begin >= 0.5


def test_the_child_that_puts_things_back_is_not_taken_for_a_leftover_of_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv(*processes.mark(tmp_path))
    pid = link.outlive("sleep 30")
    try:
        assert processes.kill_marked(tmp_path, 5.0) == (0, True)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_machine_that_cannot_be_split_off_is_named():
    for name, said in (("no.such.host.invalid", "finds no way to no.such.host.invalid"), ("127.0.0.1", "itself as")):
        with pytest.raises(ConfigError, match=f"split: .*{said}"):
            link.ways_to([name])


def test_a_job_that_cannot_cut_it_is_refused_before_it_begins(tmp_path):
    settings = [f"run_dir={tmp_path / 'run'}", "faults.allow=true", "faults.at=[cut-link h1 for 2 s @ step 5]"]
    done = subprocess.run([sys.executable, "launch/train.py", *settings], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "cut-link: expected a job on several machines" in done.stderr, done
    assert not (tmp_path / "run").exists()
