"""A rank's output and last words: nothing is lost to a terminal that is slow or gone, and the cause is what one reads."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gemini_gnn.errors import ClusterError, ExchangeError
from gemini_gnn.observe import logs
from gemini_gnn.observe.logs import choose_first, first_error, is_consequence, machine_of, read_errors, verdict

# --- pure -------------------------------------------------------------------------------------------------------------


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.1.2.3]:31413"),
        RuntimeError("Timed out waiting 20000ms for recv operation to complete"),
        ClusterError("rank 0 could not finish 'partition': no room"),
        caused(ExchangeError("halo exchange of step 3 failed"), RuntimeError("Connection reset by peer")),
    ],
)
def test_errors_that_only_say_another_rank_is_gone(error):
    assert is_consequence(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        ValueError("expected a connection closed by a bracket"),
        FileNotFoundError("no such file"),
        KeyError("timeout"),
    ],
)
def test_errors_that_are_causes(error):
    assert not is_consequence(error)


def record(rank, consequence, at=0.0, expected=False):
    return {
        "rank": rank,
        "machine": f"h{rank}",
        "time": at,
        "type": "RuntimeError" if consequence else "ValueError",
        "message": "Connection closed by peer" if consequence else "bad value",
        "traceback": "Traceback: ...",
        "consequence": consequence,
        "expected": expected,
    }


def test_the_cause_counts_before_its_consequences_whatever_the_clocks_say():
    assert choose_first([]) is None
    assert choose_first([record(0, True, 1.0), record(1, False, 5.0), record(2, False, 9.0)])["rank"] == 1
    assert choose_first([record(0, True, 2.0), record(3, True, 1.0)])["rank"] == 3


def test_one_rank_explains():
    records = [record(0, True), record(1, False), record(2, True)]
    assert verdict(records, 1, 3, {}).startswith("ValueError: bad value\nTraceback")
    assert verdict(records, 0, 3, {}) == "stopped, because rank 1 on h1 failed: ValueError: bad value"
    assert verdict(records, 2, 3, {}) is None
    assert verdict([record(1, False, expected=True)], 1, 3, {}) == "bad value"


def test_silent_ranks_are_named_by_the_lowest_that_speaks():
    records = [record(1, True), record(3, True)]
    said = verdict(records, 1, 4, {0: "h0", 1: "h1", 2: "h0", 3: "h3"})
    assert said.startswith("lost rank 0 on h0, rank 2 on h0: no answer") and "Try: ssh h0 true." in said
    slow = verdict(records, 1, 4, {0: "h0", 1: "h1", 2: "h3", 3: "h3"})
    assert slow.startswith("lost rank 0 on h0: no answer"), "rank 2's machine speaks"
    killed = verdict([record(1, True)], 1, 2, {0: "h1", 1: "h1"})
    assert killed.startswith("rank 0 on h1 ended without a word") and "logs/rank-0.log" in killed
    assert verdict(records, 3, 4, {}) is None
    assert "is the network cut?" in verdict([record(0, True), record(1, True)], 0, 2, {})
    assert "rank 0 on an unknown machine" in verdict([record(1, True)], 1, 2, {})


def test_the_last_header_of_a_log_names_the_machine():
    text = logs.header(2, "h2", 10, "then") + "words --- rank 1 on h9\n" + logs.header(2, "h4", 11, "now")
    assert machine_of(text) == "h4" and machine_of("nothing") is None


# --- files ------------------------------------------------------------------------------------------------------------


def test_records_of_ranks(tmp_path):
    assert first_error(tmp_path) is None
    logs.record_error(tmp_path, 0, RuntimeError("Connection closed by peer"))
    try:
        raise ValueError("no such label")
    except ValueError as error:
        logs.record_error(tmp_path, 3, error)
    (tmp_path / "errors" / "rank-1.json").write_text('{"cut o')
    machine = os.uname().nodename
    assert first_error(tmp_path) == f"rank 3 on {machine}: ValueError: no such label"
    assert [r["rank"] for r in read_errors(tmp_path)] == [0, 3]
    assert "raise ValueError" in read_errors(tmp_path)[1]["traceback"]
    logs.forget_errors(tmp_path)
    assert first_error(tmp_path) is None


def test_a_run_directory_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "errors").write_text("a file where the folder should be")
    logs.record_error(tmp_path, 0, ValueError("x"))
    assert "warning: cannot write" in capsys.readouterr().err


def test_without_redirect_an_error_goes_to_stderr(tmp_path, capsys):
    logs.last_words(tmp_path, 0, 2, ClusterError("no way there"))
    assert capsys.readouterr().err == "error: no way there\n"
    assert "ClusterError" in first_error(tmp_path)


def test_every_rank_ends_with_the_code_of_the_first_error(tmp_path):
    """Whichever rank a launcher sees end first."""
    lost = ExchangeError("rank 0: rank 1 failed while preparing rows")  # for users, and no cause
    logs.record_error(tmp_path, 1, KeyError("a bug"))
    assert [logs.last_words(tmp_path, 0, 2, lost), logs.last_words(tmp_path, 1, 2, KeyError("a bug"))] == [1, 1]
    logs.forget_errors(tmp_path)
    logs.record_error(tmp_path, 1, ClusterError("no such interface"))
    assert logs.last_words(tmp_path, 0, 2, RuntimeError("Connection closed by peer")) == 2
    logs.forget_errors(tmp_path)
    assert logs.last_words(tmp_path, 0, 2, lost, settle_s=0) == 2, "nobody says why"


def test_a_full_disk_drops_lines_and_no_more():
    with open("/dev/full", "wb") as full:
        assert logs._Tolerant(full.fileno(), "w", closefd=False).write(b"line\n") == 5


# --- processes --------------------------------------------------------------------------------------------------------

START = """
import os, sys
from pathlib import Path
from gemini_gnn.observe import logs
folder, rank, terminal = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "yes"
logs.redirect(folder, rank, terminal)
"""


def start(folder, script, rank=0, terminal=True, **pipes):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    command = [sys.executable, "-c", START + script, str(folder), str(rank), "yes" if terminal else "no"]
    return subprocess.Popen(command, text=True, **pipes)


def log_of(folder, rank=0):
    return (folder / "logs" / f"rank-{rank}.log").read_text()


def finish(process, timeout_s=30):
    try:
        return process.communicate(timeout=timeout_s)
    finally:
        process.kill()


def test_all_output_lands_in_the_log_and_that_of_rank_0_on_the_terminal(tmp_path):
    script = (
        "print('python'); os.write(1, b'descriptor\\n'); os.system('echo program'); print('wrong', file=sys.stderr)"
    )
    for rank, terminal in ((0, True), (1, False)):
        process = start(tmp_path, script, rank, terminal)
        out, err = finish(process)
        said = "python\ndescriptor\nprogram\nwrong\n"
        first, _, rest = log_of(tmp_path, rank).partition("\n")
        assert rest == said and machine_of(first + "\n") == os.uname().nodename
        assert (out, err) == (said if terminal else "", "")


def test_a_second_start_appends(tmp_path):
    for word in ("one", "two"):
        out, _ = finish(start(tmp_path, f"print({word!r})"))
        assert out == f"{word}\n"
    assert log_of(tmp_path).count("--- rank 0 on") == 2


def test_a_terminal_that_is_gone(tmp_path):
    process = start(
        tmp_path, "sys.stdin.readline()\nfor i in range(1000): print('line', i)\nprint('end')", stdin=subprocess.PIPE
    )
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    assert log_of(tmp_path).endswith("line 999\nend\n")


def test_a_terminal_that_takes_nothing(tmp_path):
    """Two megabytes into a pipe nobody reads: only the copying thread waits, and the process ends all the same."""
    process = start(
        tmp_path, "for i in range(20_000): print('x' * 100)\nlogs.last_words(folder, 0, 1, ValueError('y'))"
    )
    begin = time.monotonic()
    try:
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
    assert time.monotonic() - begin < 10, "it waited for the terminal more than once"
    assert "ValueError: y" in log_of(tmp_path) and log_of(tmp_path).count("x" * 100) == 20_000


def test_a_terminal_that_hangs_up(tmp_path):
    process = start(tmp_path, "print('ready'); sys.stdin.readline(); print('still here')", stdin=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate("\n", timeout=30)
    assert (process.returncode, out) == (0, "still here\n")


def test_the_terminal_reads_the_cause_and_the_logs_keep_the_rest(tmp_path):
    cause = "try: raise ValueError('label 7 of 5')\nexcept ValueError as e: logs.last_words(folder, rank, 3, e)"
    loss = "sys.stdin.readline(); logs.last_words(folder, rank, 3, RuntimeError('Connection closed by peer'))"
    ranks = [start(tmp_path, loss, 0, stdin=subprocess.PIPE), start(tmp_path, loss, 1, False, stdin=subprocess.PIPE)]
    ranks.append(start(tmp_path, cause, 2, False))
    said = [finish(ranks[2])]
    for process in ranks[:2]:
        process.stdin.write("\n")
        process.stdin.flush()
        said.append(finish(process))
    machine = os.uname().nodename
    assert said[0][1].startswith(f"error: rank 2 on {machine}: ValueError: label 7 of 5\nTraceback")
    failed = f"stopped, because rank 2 on {machine} failed: ValueError: label 7 of 5"
    assert said[1] == ("", f"error: rank 0 on {machine}: {failed}\n")
    assert said[2] == ("", "")
    assert "Connection closed by peer" in log_of(tmp_path, 0) and "Connection closed by peer" in log_of(tmp_path, 1)


def test_leaving_waits_for_no_thread(tmp_path):
    script = (
        "import threading; threading.Thread(target=threading.Event().wait).start()\n"
        "print('last'); logs.last_words(folder, 0, 1, ValueError('y')); logs.leave(1)"
    )
    process = start(tmp_path, script)
    out, err = finish(process)
    assert (process.returncode, out) == (1, "last\n") and "ValueError: y" in err


def test_a_crash_in_c_is_in_the_log(tmp_path):
    process = start(tmp_path, "import ctypes; print('before'); ctypes.string_at(0)")
    finish(process)
    assert process.returncode == -signal.SIGSEGV
    assert "before" in log_of(tmp_path) and "Segmentation fault" in log_of(tmp_path)
