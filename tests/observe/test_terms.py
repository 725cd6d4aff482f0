"""The job's part of a run directory: terms, id and token."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from gemini_gnn.errors import RunDirError
from gemini_gnn.observe import terms
from tests.observe.locks import held_locks

PATIENCE_S = 60.0
BEAT_S = 0.1
ELSEWHERE = {"boot": "another machine's", "machine": "h1", "owner": "the worker agent on h1, pid 7"}


@pytest.fixture(params=["links", "no links"])
def file_system(request, monkeypatch):
    if request.param == "no links":
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))


@pytest.fixture
def run_dir(tmp_path):
    terms.make_run_dir(tmp_path)
    return tmp_path


def claim(run_dir, record=None, **options):
    return terms.claim_term(run_dir, record or {}, **{"beat_s": BEAT_S, **options})


def claim_at_once(run_dir, **options):
    begin = time.monotonic()
    term = claim(run_dir, beat_s=20.0, **options)
    assert time.monotonic() - begin < 10.0, "nothing is waited for"
    return term


def forge(run_dir, term, record, word="1"):
    """A term of a process that is none of ours."""
    (run_dir / "terms" / f"{term}.json").write_text(json.dumps({"term": term, **record}))
    (run_dir / "terms" / f"{term}.beat").write_text(word)


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


HOLDER = """
import sys, time
from pathlib import Path
from gemini_gnn.observe import terms
from tests.observe.locks import held_locks
term = terms.claim_term(Path(sys.argv[1]), {"owner": "the first"})
beats = terms.Beats(Path(sys.argv[1]), term)
print(term, flush=True)
sys.stdin.read()
beats.stop()
"""


def start_holder(run_dir):
    command = [sys.executable, "-c", HOLDER, os.fspath(run_dir)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "1\n"
    return holder


# --- one machine --------------------------------------------------------------------------------------------------------


def test_a_term_follows_one_that_was_left(run_dir):
    (run_dir / "terms" / "notes.json").write_text("{}")
    for term in (1, 2, 3):
        assert claim(run_dir) == term == terms.newest_term(run_dir)["term"]
        terms.leave_term(run_dir, term)
    assert terms.newest_term(run_dir)["pid"] == os.getpid()


@pytest.mark.parametrize("end", ["in order", "killed", "killed and not reaped"])
def test_a_living_holder_is_named_and_a_dead_one_is_followed_at_once(run_dir, end):
    holder = start_holder(run_dir)
    try:
        with pytest.raises(
            RunDirError, match=r"in use by the first; stop it there with `python launch/stop.py run_dir="
        ):
            claim(run_dir)
        if end == "in order":
            holder.communicate(timeout=PATIENCE_S)
            assert (run_dir / "terms" / "1.beat").read_text().strip() == terms.OVER
        else:
            os.kill(holder.pid, signal.SIGKILL)
            if end == "killed":
                holder.wait(PATIENCE_S)
        with held_locks(run_dir):
            assert claim_at_once(run_dir) == 2
    finally:
        holder.kill()
        holder.communicate()


def test_another_process_with_the_number_of_the_dead_one(run_dir):
    claim(run_dir)
    record = terms.newest_term(run_dir)
    forge(run_dir, 2, {**record, "started": record["started"] - 1})
    assert claim_at_once(run_dir) == 3


# --- several machines ---------------------------------------------------------------------------------------------------


def test_a_holder_on_another_machine_lives_while_it_beats(run_dir):
    forge(run_dir, 1, ELSEWHERE)
    said = []
    with terms_beating(run_dir, 1), pytest.raises(RunDirError, match="in use by the worker agent on h1, pid 7"):
        claim(run_dir, say=said.append, beat_s=2.0)
    assert said == ["checking for 6 s whether the worker agent on h1, pid 7 still lives"]


def test_a_holder_on_another_machine_that_does_not_beat_is_dead_after_three(run_dir):
    forge(run_dir, 1, ELSEWHERE)
    begin = time.monotonic()
    with held_locks(run_dir):
        assert claim(run_dir) == 2
    assert time.monotonic() - begin >= terms.PATIENCE * BEAT_S
    forge(run_dir, 3, ELSEWHERE, f"{terms.OVER}\n")
    assert claim_at_once(run_dir) == 4


@pytest.mark.parametrize("unknown", [{"boot": ""}, {"pid_namespace": "pid:[1]"}, {"pid": None}])
def test_a_process_that_this_one_cannot_see_is_judged_by_its_beats(run_dir, monkeypatch, unknown):
    if "boot" in unknown:  # a sandbox hides it: all records say "", which names no machine
        here = terms._this_process()
        monkeypatch.setattr(terms, "_this_process", lambda: {**here, "boot": ""})
    forge(run_dir, 1, {**terms._this_process(), **unknown})
    said = []
    assert claim(run_dir, say=said.append) == 2 and len(said) == 1


@pytest.mark.parametrize("answer", [True, False, None])
def test_a_holder_is_asked_first(run_dir, answer):
    forge(run_dir, 1, {**ELSEWHERE, "address": "10.0.0.1", "port": 7})
    asked = []

    def ask(record):
        asked.append(record["port"])
        return answer

    if answer:
        with pytest.raises(RunDirError, match="in use by"):
            claim(run_dir, ask=ask)
    else:
        assert (claim if answer is None else claim_at_once)(run_dir, ask=ask) == 2
    assert asked == [7]


def test_time_in_which_the_file_system_hung_does_not_count(run_dir, monkeypatch):
    """It hangs for all: the holder gets the beats it is due before it is judged."""
    forge(run_dir, 1, ELSEWHERE)
    read, reads = terms._read_beat, []

    def hangs(folder, term):
        reads.append(term)
        if len(reads) == 3:
            time.sleep(5 * BEAT_S)  # what this machine waits for
        if len(reads) == 10:
            terms.beat(run_dir, 1, 2)
        return read(folder, term)

    monkeypatch.setattr(terms, "_read_beat", hangs)
    with pytest.raises(RunDirError, match="in use by"):
        claim(run_dir)


# --- at once, and interrupted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [{}, {"pid": 2**22 + 1, "started": 1}, ELSEWHERE])
def test_of_several_starts_one_wins(run_dir, file_system, dead):
    """The term before is of nobody, of a dead process here, or of a machine that is gone."""
    before = 0

    def start(_):
        together.wait(PATIENCE_S)
        try:
            return claim(run_dir)
        except RunDirError as error:
            assert "in use by" in str(error)

    for _ in range(10):
        if dead:
            before += 1
            forge(run_dir, before, {**terms._this_process(), **dead})
        together = threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            won = [term for term in pool.map(start, range(8)) if term]
        assert won == [before + 1]
        before += 1
        terms.leave_term(run_dir, before)


def test_a_cached_listing_does_not_bring_an_older_term_back(run_dir, monkeypatch):
    for term in (1, 2):
        forge(run_dir, term, {}, terms.OVER)
    assert claim(run_dir, {"owner": "the holder"}) == 3
    old = [run_dir / "terms" / "1.json"]
    monkeypatch.setattr(terms, "_terms", lambda _: old)
    with pytest.raises(RunDirError, match="in use by the holder"):
        claim(run_dir)
    monkeypatch.undo()
    assert terms.newest_term(run_dir)["term"] == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from gemini_gnn import files
from gemini_gnn.observe import terms
from tests.observe.locks import held_locks
where, run_dir = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def no_links(*_):
    raise OSError(95, "no links here")

match where:
    case "before it creates":
        terms.create = die
    case "before it names":
        os.link = die
    case "before it writes":
        os.link, write = no_links, files._write_new
        def first_whole(path, text, mode):
            if path.name[0] == ".":
                return write(path, text, mode)
            os.fsync = die
            write(path, "", mode)
        files._write_new = first_whole
    case "before it beats":
        terms.beat = die
    case "while it ends":
        terms._write_beat = lambda folder, term, word: die() if word == terms.OVER else None
term = terms.claim_term(Path(run_dir), {})
terms.Beats(Path(run_dir), term).stop()
"""


@pytest.mark.parametrize(
    ("where", "next_term"),
    [
        ("before it creates", 1),
        ("before it names", 1),
        ("before it writes", 2),
        ("before it beats", 2),
        ("while it ends", 2),
    ],
)
def test_a_start_that_was_killed_at_any_moment_is_followed(run_dir, where, next_term):
    killed = subprocess.run([sys.executable, "-c", KILLED, where, os.fspath(run_dir)], timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL
    begin, said = time.monotonic(), []
    assert claim(run_dir, say=said.append) == next_term == terms.newest_term(run_dir)["term"]
    assert bool(said) == (where == "before it writes"), "only a term without a record has to be watched"
    assert not said or time.monotonic() - begin >= terms.PATIENCE * BEAT_S


def test_a_record_that_comes_late_is_seen(run_dir):
    """Its writer was only slow."""
    (run_dir / "terms" / "1.json").touch()
    (run_dir / "terms" / "1.beat").touch()
    with ThreadPoolExecutor(1) as pool:
        started = threading.Event()
        second = pool.submit(claim, run_dir, say=lambda text: started.set(), beat_s=2.0)
        assert started.wait(PATIENCE_S)
        forge(run_dir, 1, {**terms._this_process(), "owner": "the slow one"}, "")
        with pytest.raises(RunDirError, match="in use by the slow one"):
            second.result(PATIENCE_S)


# --- beats --------------------------------------------------------------------------------------------------------------


@contextmanager
def terms_beating(run_dir, term):
    beats = terms.Beats(run_dir, term, BEAT_S / 10)
    try:
        yield beats
    finally:
        beats.stop()


def test_beats_change_until_they_are_over(run_dir):
    term = claim(run_dir)
    path = run_dir / "terms" / f"{term}.beat"
    seen = {path.read_text()}
    with terms_beating(run_dir, term) as beats:
        wait_for(lambda: seen.add(path.read_text()) or len(seen) > 12, "a dozen beats")
        assert not beats.lost
    assert path.read_text() == f"{terms.OVER:<20}\n", "a shorter word leaves nothing of a longer one"


def test_a_holder_that_looked_dead_learns_that_it_lost_its_term(run_dir):
    term = claim(run_dir, ELSEWHERE)
    assert terms.beat(run_dir, term, 1)
    assert claim(run_dir) == 2  # it did not beat meanwhile
    assert not terms.beat(run_dir, term, 2)
    with terms_beating(run_dir, term) as beats:
        wait_for(lambda: beats.lost, "the loss")


def test_a_file_system_that_fails_or_hangs_is_said_once_and_holds_nobody_up(run_dir, monkeypatch, capfd):
    term = claim(run_dir)
    write, failed, hangs, go_on = terms._write_beat, [], threading.Event(), threading.Event()

    def fails(*_):
        failed.append(1)
        raise OSError(errno.EIO, "Input/output error")

    def hang(*_):
        hangs.set()
        go_on.wait(PATIENCE_S)

    monkeypatch.setattr(terms, "_write_beat", fails)
    with terms_beating(run_dir, term) as beats:
        wait_for(lambda: len(failed) > 3, "failing beats")
        monkeypatch.setattr(terms, "_write_beat", write)
        wait_for(lambda: Path(run_dir, "terms", f"{term}.beat").read_text().strip() > "0", "a beat that is written")
        monkeypatch.setattr(terms, "_write_beat", hang)
        assert hangs.wait(PATIENCE_S)
        begin = time.monotonic()
        beats.stop(0.1)
        assert time.monotonic() - begin < PATIENCE_S / 2
        monkeypatch.setattr(terms, "_write_beat", write)
        go_on.set()
    assert capfd.readouterr().err.count("warning: cannot write to") == 1


# --- succession ---------------------------------------------------------------------------------------------------------


def test_of_all_that_would_succeed_one_does(run_dir, file_system):
    assert claim(run_dir) == 1
    for term in range(1, 4):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda n, term=term: terms.succeed(run_dir, term, {"owner": n}, f"{n}"), range(8)))
        assert won.count(True) == 1
        record, word, lives = terms.newest_holder(run_dir)
        assert (record["term"], record["owner"], word, lives) == (term + 1, won.index(True), "0", True)
    assert terms.succeed(run_dir, 1, {}, "late") is False, "of an older term"
    assert terms.newest_term(run_dir)["term"] == 4


SUCCEEDS = """
import sys
from pathlib import Path
from gemini_gnn.observe import terms
sys.stdin.readline()
print(terms.succeed(Path(sys.argv[1]), 1, {}, sys.argv[2]), flush=True)
"""


def test_of_several_processes_one_succeeds(run_dir):
    assert claim(run_dir) == 1
    command = [sys.executable, "-c", SUCCEEDS, str(run_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    all_of_them = [subprocess.Popen([*command, str(number)], **pipes) for number in range(6)]
    for one in all_of_them:
        one.stdin.write("go\n")
        one.stdin.flush()
    said = [one.communicate(timeout=PATIENCE_S)[0].strip() for one in all_of_them]
    assert sorted(said) == ["False"] * 5 + ["True"]


@pytest.mark.parametrize("lost", ["the answer to the link", "the beat"])
def test_a_claim_that_was_made_but_raised_is_found_again(run_dir, monkeypatch, lost):
    """A file server may make the link, lose the answer, and refuse the same request when it is repeated."""
    assert claim(run_dir) == 1
    where, name = (os, "link") if lost == "the answer to the link" else (terms, "beat")
    whole = getattr(where, name)

    def fails(*arguments):
        whole(*arguments)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(where, name, fails)
    with pytest.raises(OSError):
        terms.succeed(run_dir, 1, {}, "mine")
    monkeypatch.undo()
    assert terms.succeed(run_dir, 1, {}, "another") is False
    assert terms.succeed(run_dir, 1, {}, "mine") is True
    assert terms.newest_term(run_dir)["term"] == 2


def test_a_holder_learns_who_has_taken_over(run_dir):
    term = claim(run_dir)
    with terms_beating(run_dir, term) as beats:
        assert terms.succeed(run_dir, term, {"start": "s", "port": 7}, "n")
        wait_for(lambda: beats.lost, "the loss")
        assert (beats.successor["start"], beats.successor["port"], beats.successor["term"]) == ("s", 7, 2)


def test_a_watch_sees_each_newer_term_also_after_the_file_system_failed(run_dir, monkeypatch):
    claim(run_dir)
    watch, failed, listed = terms.Watch(run_dir, 0.01), [], terms._terms

    def fails(_):
        failed.append(1)
        raise OSError(errno.ESTALE, "Stale file handle")

    try:
        wait_for(lambda: watch.record.get("term") == 1, "the first term")
        monkeypatch.setattr(terms, "_terms", fails)
        wait_for(lambda: len(failed) > 2, "a file system that fails")
        monkeypatch.setattr(terms, "_terms", listed)
        assert terms.succeed(run_dir, 1, {}, "n")
        wait_for(lambda: watch.record.get("term") == 2, "the second term")
    finally:
        watch.stop()


# --- id and token -------------------------------------------------------------------------------------------------------


def test_a_run_directory_has_one_id_and_one_token(run_dir):
    run, secret = terms.run_id(run_dir), terms.token(run_dir)
    assert terms.run_id(run_dir) == run and terms.token(run_dir) == secret and len(secret) == 32
    assert sorted(path.name for path in (run_dir / "terms").iterdir()) == ["id", "token"]
    assert (run_dir / "terms" / "token").stat().st_mode & 0o777 == 0o600
    for name, ask in (("id", terms.run_id), ("token", terms.token)):
        (run_dir / "terms" / name).write_text("12")
        with pytest.raises(RunDirError, match="incomplete"):
            ask(run_dir, patience_s=0.0)
    (run_dir / "terms" / "token").write_text("no hex" * 20)
    with pytest.raises(RunDirError, match="damaged"):
        terms.token(run_dir)


def test_a_token_that_others_know_is_refused(run_dir, monkeypatch):
    terms.token(run_dir)
    path = run_dir / "terms" / "token"
    path.chmod(0o640)
    with pytest.raises(RunDirError, match="mode 0600.*got one of user .* with mode 0640; end the job, remove the file"):
        terms.token(run_dir)
    path.chmod(0o600)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(RunDirError, match=f"expected a file of user {owner + 1} .* got one of user {owner} "):
        terms.token(run_dir)
    monkeypatch.undo()
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(RunDirError, match="cannot make or read"):
        terms.token(run_dir)


def test_at_the_same_moment_id_and_token_are_one(run_dir, file_system):
    for ask in (terms.run_id, terms.token):
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(lambda _, ask=ask: ask(run_dir), range(8)))) == 1
    assert sorted(path.name for path in run_dir.glob("terms/*")) == ["id", "token"]
