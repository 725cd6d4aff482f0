"""A test of real processes or hosts that fails is run once more; if it then passes, the end of the run names it.

How long processes take to start, to be seen and to die is up to the machine. A test that failed once is to be mended all the
same, so it is never silent: what it failed of stands at the end, and its name is the last thing that is said. A pure test is
never run again, nor is one that only computes in several processes, nor a campaign, whose failures are what it is for.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

MARKS = ("lab", "processes")
FIXTURES = {"job", "living", "quickstart", "run_dir"}  # these start processes: a test that uses one needs no mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("usepdb"):
        return  # a debugger stops at the first failure
    for item in items:
        real = any(map(item.get_closest_marker, MARKS)) or FIXTURES & set(getattr(item, "fixturenames", ()))
        if real and not item.get_closest_marker("long"):
            item.add_marker(pytest.mark.flaky(reruns=1))  # of pytest-rerunfailures


@pytest.hookimpl(wrapper=True, tryfirst=True)  # after everything else that is said at the end
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    yield
    stats = terminalreporter.stats
    failed = {report.nodeid for report in [*stats.get("failed", []), *stats.get("error", [])]}
    flaky = {report.nodeid: report for report in stats.get("rerun", []) if report.nodeid not in failed}
    if not flaky:
        return
    terminalreporter.section("tests that failed once and passed when run again", red=True)
    for name, report in flaky.items():
        terminalreporter.section(name, "_")
        terminalreporter.line(report.longreprtext)
    for name in flaky:
        terminalreporter.line(f"FLAKY, to be mended: {name}", red=True)
