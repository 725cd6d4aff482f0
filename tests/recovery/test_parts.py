"""Arena, locks, sockets and words: the parts of recovery by themselves."""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from dataclasses import replace

import pytest

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import FaultsConfig, RecoveryConfig, SnapshotConfig
from gemini_gnn.errors import RecoveryError, RunDirError
from gemini_gnn.faults import schedule
from gemini_gnn.observe import terms
from gemini_gnn.recovery import board, home, messages, shim
from gemini_gnn.recovery.outcome import Failure, Outcome
from gemini_gnn.recovery.screen import Screen
from gemini_gnn.recovery.worker import children, decisions, entry
from gemini_gnn.recovery.worker.journal import Journal
from gemini_gnn.snapshot.store import locks
from gemini_gnn.snapshot.store.arena import SlotFile
from gemini_gnn.snapshot.store.format import Header, SlotState
from gemini_gnn.snapshot.store.identity import Identity
from tests.recovery.jobs import PATIENCE_S


def test_the_lock_has_one_holder_and_survives_removal(short_path):
    arena = short_path / "user" / "job"
    lock = home.take_lock(arena)
    assert lock is not None and home.take_lock(arena) is None and locks.agent_lives(arena)
    home.leave_arena(arena)
    assert not arena.parent.exists()
    another = home.take_lock(arena)  # the old file is still locked, but it is not this one
    assert another is not None
    os.close(lock)
    os.close(another)
    assert not locks.agent_lives(arena)


def test_a_folder_of_somebody_else_is_refused(short_path):
    (short_path / "target").mkdir()
    (short_path / "user").symlink_to(short_path / "target")
    with pytest.raises(RecoveryError, match="it is a link"):
        home.take_lock(short_path / "user" / "job")


def test_a_long_path_is_refused(tmp_path):
    with pytest.raises(RecoveryError, match="too long for a socket"):
        home.make_arena(tmp_path / ("x" * 120))


def test_an_arena_belongs_to_one_run(short_path):
    home.make_arena(short_path / "arena")
    assert not home.belongs_to(short_path / "arena", "one")
    home.assign(short_path / "arena", "one")
    assert home.belongs_to(short_path / "arena", "one") and not home.belongs_to(short_path / "arena", "another")


def test_one_of_several_machines_does_not_forget_by_itself(short_path):
    """Its file system may not be mounted: then it sees a new run directory where the others see that of the job."""
    arena = short_path / "arena"
    home.make_arena(arena)
    home.assign(arena, "one")
    assert home.why_forget(arena, "another", "auto", several_machines=True) == "", "nothing is lost"
    (arena / "rank-00000.0").touch()
    assert home.why_forget(arena, "one", "auto", several_machines=True) == ""
    assert "removed" in home.why_forget(arena, "another", "auto", several_machines=False)
    with pytest.raises(RecoveryError, match=r"mounted.*Nothing was changed\. resume=never"):
        home.why_forget(arena, "another", "auto", several_machines=True)
    assert home.why_forget(arena, "another", "never", several_machines=True) == "resume=never"


def test_slots_without_a_committed_snapshot_are_nothing(short_path):
    arena = short_path / "arena"
    home.make_arena(arena)
    assert home.holds_nothing(arena)
    slot = SlotFile(arena, "rank-00000", 0, create=True)
    header = Header(SlotState.WRITING, Identity(1, 1, 0), 0, "rank-00000", 0, "job", bytes(16))
    slot.write_header(header)
    assert home.holds_nothing(arena)
    slot.write_header(replace(header, state=SlotState.COMMITTED))
    assert not home.holds_nothing(arena)
    slot.close()
    slot.path.rename(arena / "something-else")
    assert not home.holds_nothing(arena), "not ours to judge"


def test_living_trainers_are_seen_until_the_kernel_is_done_with_them(tmp_path):
    assert locks.living_trainer(tmp_path) is None
    ready, says = os.pipe()
    child = os.fork()
    if child == 0:
        locks.hold_trainers_lock(tmp_path)
        os.write(says, b".")
        signal.pause()
    os.read(ready, 1)
    assert locks.living_trainer(tmp_path) == child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert locks.living_trainer(tmp_path) is None
    os.close(ready)
    os.close(says)


@pytest.fixture
def below(tmp_path):
    """The children of an agent that this process plays, with trainers 0 and 1 asked for; ``ends``: what a trainer would hold."""
    terms.make_run_dir(tmp_path)
    warm, theirs = messages.pair(messages.FROM_WARM)
    to_warm = messages.Channel(theirs, messages.TO_WARM)
    with selectors.DefaultSelector() as selector:
        found = children.Children(tmp_path, "job", Journal(tmp_path, "m"), selector)
        found.warm = children.Warm(os.getpid(), warm, [], [])
        found.fork({rank: a_task(rank) for rank in range(2)})
        (asked,) = to_warm.receive()
        found.ends = [messages.Channel(socket.socket(fileno=fd), messages.TO_TRAINER) for fd in asked.descriptors]
        yield found
    for channel in (warm, to_warm, *found.ends, *(one.channel for one in found.trainers.values())):
        channel.close()


def a_task(rank: int) -> messages.Task:
    place = Place(rank, 2, rank, 2, "m", "127.0.0.1", 0, "plain")
    words = dict.fromkeys(("target", "folder", "log", "job", "arena"), "x")
    lists: dict = dict(path=[], command=[], cores=[])
    return messages.Task(
        place, payload={}, environment={}, term=1, generation=1, resume="auto", sharing=1, **words, **lists
    )


def test_a_task_becomes_the_context_of_its_trainer(tmp_path, monkeypatch):
    """Also the way back: what the agent writes on the trainer's page."""
    task = replace(a_task(1), arena=os.fspath(tmp_path), replicas=2, kept=[4, 5])
    here = entry.context_of(task)
    assert (here.rank, here.local_rank, here.replicas, here.kept) == (1, 1, 2, (4, 5))
    monkeypatch.setattr(board, "_page", None)
    assert here.recoverable() is None and here.persist_at() == 0
    board.make(tmp_path, 2)
    board.attach(tmp_path, 1, 1)
    view = board.open_board(tmp_path)
    board.tell_recoverable(view, 1, Identity(1, 1, 7))
    board.ask_to_persist(view, 1, 9)
    assert here.recoverable() == (1, 1, 7) and here.persist_at() == 9
    here.committed(1, 1, 9)
    here.hold(1, 1, 9)
    seen = board.read(view, 1)
    assert seen.snapshot[:3] == seen.held == (1, 1, 9)
    os.close(board._page._bell)


def test_a_trainer_says_its_pid_and_gets_its_task(below):
    below.ends[1].send(messages.Forked(17))
    assert below.read(time.monotonic()) == [] and below.trainers[1].pid == 17
    assert below.ends[1].receive() == [a_task(1)] and below.ends[0].receive() == []


def test_a_trainer_that_has_not_said_its_pid_is_gone_when_it_is_killed_or_its_socket_closes(below):
    below.kill([0])
    assert below.has_news
    assert below.read(time.monotonic()) == [decisions.Exited(0, -signal.SIGKILL)]
    below.ends[0].send(messages.Forked(17))
    assert below.ends[0].receive() == [] and below.ends[0].closed  # no task for it, however late it is forked
    below.ends[1].close()
    assert below.read(time.monotonic()) == [decisions.Exited(1, -signal.SIGKILL)] and below.trainers == {}


def test_a_trainer_that_dies_with_its_words_unread(below):
    """Its exit is seen before its first message is read: it must not be taken for a stranger's."""
    failed = messages.Failed(3, 1.0, "s", "t", consequence=False)
    child = os.fork()
    if child == 0:
        below.ends[0].send(messages.Forked(os.getpid()))
        below.ends[0].send(failed)
        os._exit(3)
    below.ends[0].close()
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    told = decisions.Failed(Failure(0, 3, 1.0, "s", "t"))
    assert below._reaped(child, 3, time.monotonic()) == [told, decisions.Exited(0, 3)]
    os.waitpid(child, 0)


def test_nonsense_of_a_trainer_closes_its_connection_and_harms_nobody(below):
    for end in below.ends:
        end.send(messages.Forked(17))
    below.ends[0].sock.sendall(b'{"kind": "failed", "code": "x"}\n')
    assert below.read(time.monotonic()) == [] and below.trainers.keys() == {0, 1}
    assert below.trainers[0].channel.fileno() < 0 < below.trainers[1].channel.fileno()


A_BOARD = board.Board(
    9, 1, 3, 2, board.Phase.FORWARD, 0.5, 7, 0.25, (1.5, None, None, None, None), 2, 40, board.Newest(1, 1, 2, 0.25),
    Identity(1, 1, 2),
)  # fmt: skip
AT_1, AT_2, A_PEER = Identity(1, 1, 1), Identity(1, 1, 2), messages.Peer("h1", "10.0.0.2", 7)
EXAMPLES = [
    messages.Register(
        Place(0, 1, 0, 1, "m", "h0", 1, "plain"), "m:f", {"a": [1, None, 2.5]}, ["m"], "auto", RecoveryConfig(), SnapshotConfig(),
        FaultsConfig(), 30.0, 0, 0.0,
        {"A": "\udc80"}, "/", ["/x"], ["c"], [0, 1], "token", 7, "code", True,
    ),
    messages.Stop("why", 130, keep=False, force=True),
    messages.Accepted("/log", 7),
    messages.Follow("/log"),
    messages.Refused(2, "no"),
    messages.Ending(),
    messages.Stepped(),
    messages.Say("news"),
    messages.Ended("failed", 1, "r", 0, "t", "h1", 2, 3),
    messages.Join(0, "h0", 7, 4, 2, True, Failure(-1, 1, 0.5, "s", "t"), "10.0.0.1", 8, 9, "start", 2, 12),
    messages.Able(True),
    messages.Unable(Failure(0, 1, 0.5, "s", "t", True)),
    messages.Stuck("why"),
    messages.RankListens(1, 2),
    messages.RankFailed(Failure(0, 1, 0.5, "s", "t", True), 2),
    messages.RankExited(1, 2, -9, "why"),
    messages.Beat({3: A_BOARD}, [3], 7),
    messages.Welcome(1, 0.5, 5.0, 2, "start"),
    messages.RootBeat(True),
    messages.Roster(2, [messages.Member("h0", "10.0.0.1", 7)], [0], 0, 3, {"term": 2}),
    messages.Vote(5, 2, {"claimer": "me", "trains": ["disk"]}),
    messages.Voted("me", 5, True, 5, {}, [{"term": 4}]),
    messages.News({"state": "running"}, {}),
    messages.Moved("10.0.0.1", 7),
    messages.Bind(3),
    messages.Bound(3, 7, "why not"),
    messages.Begin(1, 2, 4, [2, 3], "h0", 7, "auto", AT_2, AT_1, 2, [A_PEER], [0, 1]),
    messages.Survey(3),
    messages.Look(3),
    messages.Holds(3, [("common", AT_2)]),
    messages.AskCheckpoints(3),
    messages.Stored(3, [("common", AT_2)], "why"),
    messages.PersistAt(7),
    messages.Inspect(),
    messages.Catalog("text", AT_2, 2, ["h3"]),
    messages.Replicate(1, 2, AT_2, AT_1, ["rank-00000"], ["rank-00001"], [A_PEER], 1),
    messages.Advance(AT_2),
    messages.Quiet(),
    messages.Silent(),
    messages.Fetch(3, [messages.Wanted("common", AT_2, A_PEER)]),
    messages.Fetched(3, [messages.Miss("common", AT_2, "h1", True, "why")]),
    messages.Copied(2, AT_2),
    messages.Damaged("common", AT_2, "why"),
    messages.Alive(7),
    messages.Trouble("why"),
    messages.Offer(1, 2, b"\0header", AT_2),
    messages.Go(),
    messages.Kept(),
    messages.Later("why"),
    messages.NotKept("why"),
    messages.Ask("common", AT_2),
    messages.Serve(b"\0header"),
    messages.Lacks("why"),
    messages.Persist(AT_2, ["common"]),
    messages.Persisted(AT_2, "why"),
    messages.Complete(AT_2, ["common"]),
    messages.Completed(AT_2),
    messages.ListCheckpoints(),
    messages.Checkpoints([AT_2], [["common"]], "why"),
    messages.Load(3, AT_2, ["common"]),
    messages.Close(),
    messages.Inject("kill-rank 1"),
    messages.Commit(schedule.parse_command(["kill-rank", "1"]), 3),
    messages.Committed(3, True, "killed"),
    messages.AskToStop(),
    messages.DumpStacks(),
    messages.Finish(Outcome("failed", 1, "r", True, Failure(0, 1, 0.5, "s", "t"))),
    messages.Preload(["m"], ["/x"]),
    messages.Fork([]),
    messages.Ready(0.5),
    messages.Unfit("t"),
    messages.Forked(7),
    messages.Started(0.5),
    messages.Listens(),
    messages.StopAsked(),
    messages.Failed(1, 0.5, "s", "t", True),
    a_task(0),
]  # fmt: skip


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda one: type(one).__name__)
def test_a_message_is_read_as_it_was_sent(message):
    a, b = (messages.Channel(sock, typing.get_args(messages.Message)) for sock in socket.socketpair())
    assert a.send(message) and b.receive() == [message] and not b.closed
    a.close()
    b.close()


def test_every_message_has_an_example():
    assert {type(one) for one in EXAMPLES} == set(typing.get_args(messages.Message))


def test_channel_carries_messages_and_descriptors():
    a, b = (messages.Channel(sock, (messages.Say, messages.Fork)) for sock in socket.socketpair())
    ready, says = os.pipe()
    assert a.send(messages.Say("one")) and a.send(messages.Fork([says, says])) and a.send(messages.Say("x" * 50_000))
    one, two, three = b.receive()
    assert one.text == "one" and len(three.text) == 50_000 and len(set(two.descriptors)) == 2
    os.write(two.descriptors[1], b"!")
    assert os.read(ready, 1) == b"!"
    for descriptor in (ready, says, *two.descriptors):
        os.close(descriptor)
    b.sock.send(b"no json\n")
    assert a.receive() == [] and a.closed and "Expecting value" in str(a.complaint)
    a.close()
    assert b.receive() == [] and b.closed and b.complaint is None
    b.close()


def test_descriptors_of_a_message_that_is_refused_are_closed():
    a, b = (messages.Channel(sock, (messages.Say,)) for sock in socket.socketpair())
    ready, says = os.pipe()
    a.send(messages.Fork([says]))
    os.close(says)
    assert b.receive() == [] and "expected one of say; got 'fork'" in str(b.complaint)
    b.close()
    assert os.read(ready, 1) == b""
    os.close(ready)
    a.close()


def test_channel_does_not_wait_for_a_peer_that_does_not_read():
    a, b = (messages.Channel(sock, (messages.Say,)) for sock in socket.socketpair())
    begin = time.monotonic()
    while a.send(messages.Say("x" * 100_000)):
        assert time.monotonic() - begin < 10.0
    assert a.closed and a.fileno() >= 0  # its owner's selector still has it
    a.close()
    b.close()


def test_last_words_are_heard_by_one_that_was_speaking_too():
    a, b = (messages.Channel(sock, messages.FROM_TRAINER) for sock in socket.socketpair())
    b.send(messages.Listens())
    b.close()
    assert not a.send(messages.StopAsked()) and not a.closed
    assert a.receive() == [messages.Listens()] and a.closed
    a.close()


def test_the_outcome_of_an_earlier_start_is_not_ours():
    """An agent tells its outcome to all who are connected, also to a shim of the next start it has not listened to."""
    agent, ours = (messages.Channel(sock, messages.TO_SLOT) for sock in socket.socketpair())
    agent.send(messages.Ended("failed", 1, "earlier"))
    screen = Screen(speaks=False, streams=False, terminal=False)
    assert shim._serve(ours, EXAMPLES[0], screen, shim.StopRequest()) == messages.Ending()
    agent.close()
    ours.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_log_that_cannot_be_read_ends_the_showing_and_nothing_else(tmp_path, monkeypatch, capfd, number):
    (tmp_path / "log").write_text("shown\n")
    screen = Screen(speaks=True, streams=True, terminal=False)
    screen.follow(tmp_path / "log", 0)
    screen.copy()

    def unreadable(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(os, "read", unreadable)
        screen.copy()
    assert screen.ended(messages.Ended("failed", 3, "the reason", rank=0, text="its error")) == 3
    out, err = capfd.readouterr()
    assert out == "shown\n" and "its output is no longer shown here" in err and "failed: rank 0: its error" in err
    assert err.count("cannot read") == 1


def test_a_listening_socket_is_all_that_is_made(tmp_path):
    """A second name, of an agent that is killed at once, would be taken for a snapshot."""
    for _ in range(2):
        messages.listen(tmp_path / home.AGENT_SOCKET).close()
        assert [path.name for path in tmp_path.iterdir()] == [home.AGENT_SOCKET]
    assert (tmp_path / home.AGENT_SOCKET).stat().st_mode & 0o777 == 0o600


def test_output_to_a_pipe_that_does_not_block_is_complete():
    """Some terminals and tools leave it so; a burst of output then meets a full pipe."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    screen = Screen(speaks=True, streams=True, terminal=False)
    writer = threading.Thread(target=lambda: (screen._write(into, b"x" * 1_000_000), os.close(into)))
    writer.start()
    with open(out, "rb") as reader:
        assert len(reader.read()) == 1_000_000
    writer.join()
    assert screen.streams


def test_a_full_disk_does_not_end_the_agent(tmp_path):
    """Events and the agent's own log are most often on the same disk."""
    terms.make_run_dir(tmp_path)
    (tmp_path / "events" / "agent-m.jsonl").symlink_to("/dev/full")
    program = "import sys; from pathlib import Path; from gemini_gnn.recovery.worker.journal import Journal\n"
    program += f"journal = Journal(Path({os.fspath(tmp_path)!r}), 'm'); journal.log('one'); journal.log('two')\n"
    program += "assert journal.flush(60) and 'No space left' in journal.news() and not journal.close(60)\n"
    program += "print('lives', flush=True); import os; os._exit(0)"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, timeout=PATIENCE_S)
    assert ended.returncode == 0 and ended.stdout == b"lives\n"


def test_the_first_error_is_whole_in_its_log_also_when_the_job_goes_on(tmp_path):
    terms.make_run_dir(tmp_path)
    journal = Journal(tmp_path, "m")
    errors = [Failure(0, 1, 1.0, "gone", "trace of 0", consequence=True), Failure(1, 1, 2.0, "bad", "trace of 1")]
    for first in (None, errors[1]):
        journal.errors = [*errors, Failure(2, 1, 3.0, "later", "trace of 2")]
        journal.write_errors(first)
        assert journal.flush(PATIENCE_S)
        assert journal.log_of(1).read_text() == "error: trace of 1\n" and journal.errors == []
        assert all("ended by" in journal.log_of(rank).read_text() for rank in (0, 2))
        journal.log_of(1).unlink()
    journal.errors = [Failure(rank, 2, 1.0 + rank, "bad", "it is bad") for rank in range(2)]
    journal.write_errors(journal.errors[0])
    assert journal.close(PATIENCE_S)
    assert journal.log_of(1).read_text() == "[gemini_gnn] ended by the same error as rank 0: see its log\n"


def test_an_agents_log_that_cannot_be_written_is_said(short_path):
    terms.make_run_dir(short_path)
    shim.agent_log(short_path).mkdir()
    with pytest.raises(RunDirError, match="cannot write .*agent-.*give another run_dir"):
        shim.reach_agent(home.arena_of(short_path, short_path), short_path)


def test_an_agent_that_cannot_be_started_is_said_and_the_lock_is_free_again(short_path, monkeypatch):
    terms.make_run_dir(short_path)
    arena = home.arena_of(short_path, short_path)

    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(RecoveryError, match="cannot start the worker agent: Resource temporarily unavailable"):
        shim.reach_agent(arena, short_path)
    lock = home.take_lock(arena)
    assert lock is not None
    os.close(lock)


def test_launch_token_is_one_per_launch():
    two = Place(0, 2, 0, 2, "m", "127.0.0.1", 0, "plain")
    one = Place(0, 1, 0, 1, "m", "127.0.0.1", 0, "plain")
    assert shim.launch_token(two, {}).startswith(f"{os.getppid()}-")
    assert shim.launch_token(one, {}).startswith(f"{os.getpid()}-")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert shim.launch_token(two, slurm) == shim.launch_token(one, slurm) != shim.launch_token(two, {})


@pytest.mark.parametrize("module", ["gemini_gnn.run", "gemini_gnn.recovery.shim", "gemini_gnn.recovery.worker.agent"])
def test_slot_process_and_agent_are_light(module):
    program = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert seen.stdout.strip() == "[]", seen.stderr
