"""Pytest fixtures of the lab. Built once per session, given to each test whole; it dies with the session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.lab import NAS, Lab, missing


@pytest.fixture(scope="session")
def lab_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One lab of six hosts for all tests. Skips with the reason where it cannot be built.

    With ``GEMINI_LAB_REQUIRED=1`` it fails instead, for machines where a skip would be a hole in the tests.
    """
    reason = missing()
    if reason and os.environ.get("GEMINI_LAB_REQUIRED") == "1":
        pytest.fail(f"GEMINI_LAB_REQUIRED=1, but {reason}")
    if reason:
        pytest.skip(reason)
    with Lab.up(tmp_path_factory.mktemp("lab") / "state", hosts=6, owned=True) as lab:
        yield lab


@pytest.fixture
def lab(lab_session: Lab) -> Iterator[Lab]:
    """The lab with every host on, connected and unlimited, whatever the test before did."""
    for name, host in lab_session.hosts.items():
        if not host.link:
            lab_session.link(name, True)
        if host.rate:
            lab_session.bandwidth(name, "unlimited")
        lab_session.power_on(name)
    yield lab_session
    # What a failed test left running would disturb the next one, and so would the snapshots that a failed job leaves in
    # RAM, as it should; a reboot is the surest broom.
    for name in lab_session.hosts:
        if name == NAS or not lab_session.is_on(name):
            continue
        if lab_session.processes(name) or lab_session.run(name, ["ls", "/dev/shm"]).stdout:
            lab_session.power_off(name)
