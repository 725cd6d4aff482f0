"""Show a job: ``python launch/status.py [--watch] [--json] run_dir=runs/my_run``; or draw it: ``plot=FILE.png``.

Any machine that sees the run directory can look, also when the job is over. It shows the state of the job, its machines
and ranks, and what each failure has cost; and it says from when the news is.

--watch   refresh in place until the job ends; Ctrl-C ends only the look
--json    one JSON document; with --watch a line at each change. Its fields: gemini_gnn/observe/status.py
plot=     draw what each failure has cost, and the steps by the clock
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from gemini_gnn.compose import exit_with
from gemini_gnn.observe import news

PIPE_COLUMNS = 120  # of a pipe nobody knows the width
USAGE = """usage: python launch/status.py [--watch] [--json] run_dir=RUN_DIR
       python launch/status.py plot=FILE.png run_dir=RUN_DIR"""


def main(arguments: list[str]) -> int:
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__, USAGE, sep="\n")
        return 0
    flags = {a for a in arguments if a in ("--watch", "--json")}
    settings = {name: value for name, _, value in (a.partition("=") for a in arguments if a not in flags)}
    expected = ({"run_dir"},) if flags else ({"run_dir"}, {"run_dir", "plot"})
    if settings.keys() not in expected or not all(settings.values()):
        print(USAGE, file=sys.stderr)
        return 2
    run_dir = Path(settings["run_dir"])
    if "plot" in settings:
        from gemini_gnn.observe.waterfall import draw

        news.look(run_dir)  # there is a job
        print(f"written: {draw(run_dir, Path(settings['plot']))}")
        return 0
    watch = "--watch" in flags
    # Ctrl-C is the usual end of a watch.
    with contextlib.suppress(KeyboardInterrupt) if watch else contextlib.nullcontext():
        found = looks(run_dir, watch)
        if "--json" in flags:
            say(found, indent=None if watch else 1)
        else:
            show(found)
    return 0


def looks(run_dir: Path, watch: bool) -> Iterator[news.News]:
    """One look that knows how the root is; or all of them, until the job has ended."""
    for one in news.follow(run_dir):
        if watch or one.root != "unknown":
            yield one
        if one.root == "ended" or (one.root != "unknown" and not watch):
            return


def say(found: Iterator[news.News], indent: int | None) -> None:
    before = None
    for one in found:
        if (one.seen, one.root) != before:
            before = one.seen, one.root
            print(json.dumps(one.document, indent=indent), flush=True)


def show(found: Iterator[news.News]) -> None:
    """On a terminal in place; into a file or a pipe at each change of state."""
    from rich.console import Console
    from rich.live import Live

    from gemini_gnn.observe.table import picture

    console, before = Console(), None
    if not console.is_terminal:
        console.width = max(console.width, PIPE_COLUMNS)
        for one in found:
            now = one.root, one.document.get("state"), one.document.get("generation")
            if now != before and one.root != "unknown":
                before = now
                console.print(picture(one.document))
        return
    with Live(console=console, auto_refresh=False) as live:
        for one in found:
            live.update(picture(one.document), refresh=True)


if __name__ == "__main__":
    exit_with(main)
