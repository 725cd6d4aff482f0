"""The log of a rank: everything it prints is there, and nothing that fails in writing it stops the work."""

import signal
import subprocess
import sys

from gemini_gnn.observe import logs


def test_a_person_sees_the_output_alone():
    """Neither the lines between starts nor what an agent says of a consequence: the cause is shown once, by itself."""
    output = (
        f"one\n{logs.header(2, 'h2', 10, 'then')}two\n{logs.ENDED}RuntimeError: gone (after another trainer)\nthree"
    )
    assert logs.without_headers(output.encode()) == b"one\ntwo\nthree"


START = (
    "import os, sys\nfrom pathlib import Path\nfrom gemini_gnn.observe import logs\nlogs.redirect(Path(sys.argv[1]))\n"
)


def run(log, script):
    done = subprocess.run([sys.executable, "-c", START + script, str(log)], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("", "")
    return done.returncode


def test_all_output_lands_in_the_log_also_of_programs_and_of_a_second_start(tmp_path):
    script = (
        "print('python'); os.write(1, b'descriptor\\n'); os.system('echo program'); print('wrong', file=sys.stderr)"
    )
    for _ in range(2):
        assert run(tmp_path / "log", script) == 0
    assert (tmp_path / "log").read_text() == "python\ndescriptor\nprogram\nwrong\n" * 2


def test_a_full_disk_drops_lines_and_no_more(tmp_path):
    (tmp_path / "log").symlink_to("/dev/full")
    assert run(tmp_path / "log", "print('lost'); print('lost too', file=sys.stderr); sys.exit(7)") == 7


def test_a_crash_in_c_is_in_the_log(tmp_path):
    assert run(tmp_path / "log", "import ctypes; print('before'); ctypes.string_at(0)") == -signal.SIGSEGV
    text = (tmp_path / "log").read_text()
    assert "before" in text and "Segmentation fault" in text
