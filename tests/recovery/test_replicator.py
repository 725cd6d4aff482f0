"""Replicator processes on one machine, each with an arena of its own, driven through their agents' channels."""

import contextlib
import os
import selectors
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemini_gnn.recovery import board, messages, processes, transfer, wire
from gemini_gnn.recovery.board import Phase
from gemini_gnn.recovery.messages import (
    Advance,
    Copied,
    Fetch,
    Fetched,
    Offer,
    Peer,
    Quiet,
    Replicate,
    Silent,
    Trouble,
    Wanted,
)
from gemini_gnn.recovery.worker import helpers
from gemini_gnn.recovery.worker.pace import Pace
from gemini_gnn.recovery.worker.replicator import Replicator, Shift, next_push
from gemini_gnn.snapshot.store import arena, format, locks
from tests.recovery.arenas import JOB, arena_folder, capture, flip, held, ring, slot_file, step

TOKEN = b"t" * 32
FAR_S = 30.0
BIG = 60_000_000


class Log:
    """In place of the agent's journal."""

    def log(self, kind, **fields):
        pass


@dataclass
class Machine:
    """A worker agent, as far as its replicator sees it. ``number``: of its only rank."""

    number: int
    folder: Path
    selector: selectors.BaseSelector
    listener: socket.socket
    helper: helpers.Helper
    heard: list = field(default_factory=list)

    @property
    def peer(self):
        return Peer(f"h{self.number}", *self.listener.getsockname())

    @property
    def shard(self):
        return f"rank-{self.number:05d}"

    def capture(self, number, slot, nbytes=20_000, generation=1):
        capture(self.folder, self.shard, slot, step(number, generation), nbytes)
        with contextlib.suppress(OSError):  # not there yet
            ring(self.folder)

    def replicate(self, peers, *, generation=1, since=None, recoverable=None, **options):
        """Push to ``peers``, and keep theirs."""
        kept = [one.shard for one in peers]
        own, to = [self.shard], [one.peer for one in peers]
        self.helper.send(
            Replicate(1, generation, since, recoverable, own, kept, to, **{"pages": 0, "every_s": 0.0, **options})
        )


@pytest.fixture
def machines():
    """``machines(3)``; killed and removed at the end."""
    with contextlib.ExitStack() as stack:
        made = []

        def make(count, silence_s=10.0):
            token = helpers.secret(TOKEN)
            stack.callback(os.close, token)
            for _ in range(count):
                folder = stack.enter_context(arena_folder())
                selector = stack.enter_context(selectors.DefaultSelector())
                listener = stack.enter_context(contextlib.closing(wire.listen("127.0.0.1", 0)))
                helper = helpers.replicator(folder, JOB, listener, token, Log(), selector, silence_s)
                made.append(Machine(len(made), folder, selector, listener, helper))
                stack.callback(end, helper)
            return made

        yield make


def end(helper):
    pid = helper.pid
    helper.close()
    if pid:
        with contextlib.suppress(ChildProcessError):  # reaped before
            assert processes.reap_child(pid, FAR_S) is not None


def until(done, *machines, seconds=FAR_S):
    """Look after the machines until ``done()``."""
    deadline = time.monotonic() + seconds
    while not done():
        now = time.monotonic()
        assert now < deadline, [one.heard[-5:] for one in machines]
        for one in machines:
            one.heard += [m for m in one.helper.look(now) if not isinstance(m, messages.Alive)]
            one.selector.select(0.002)
        processes.reap_children()  # as the agent does


def look_after(seconds, *machines):
    """For things that must not happen."""
    over = time.monotonic() + seconds
    until(lambda: time.monotonic() > over, *machines)


def says(machine, message):
    return lambda: message in machine.heard


def troubles(machine):
    return [one.text for one in machine.heard if isinstance(one, Trouble)]


def both(a, b):
    a.replicate([b])
    b.replicate([a])


# --- push -------------------------------------------------------------------------------------------------------------


def test_snapshots_are_copied_in_order_each_when_the_last_is_recoverable(machines):
    a, b = machines(2)
    both(a, b)
    for one in (a, b):
        one.capture(1, 0)
        one.capture(2, 1)
    until(lambda: says(a, Copied(1, step(1)))() and says(b, Copied(1, step(1)))(), a, b)
    assert held(b.folder, a.shard) == {0: step(1)} and held(a.folder, b.shard) == {0: step(1)}
    for number in (1, 2, 3, 4):
        for one in (a, b):
            assert says(one, Copied(1, step(number + 1)))() is False
            one.helper.send(Advance(step(number)))
            one.capture(number + 2, (number + 1) % 3)
        until(lambda n=number: all(says(one, Copied(1, step(n + 1)))() for one in (a, b)), a, b)
        assert set(held(b.folder, a.shard).values()) == {step(number), step(number + 1)}
    assert troubles(a) == troubles(b) == []


def test_copied_is_said_when_all_peers_have_all_shards(machines):
    a, b, c = machines(3)
    own = ["rank-00000", "rank-00001"]
    a.helper.send(Replicate(1, 1, None, None, own, [], [b.peer, c.peer], 0, 0.0))
    b.helper.send(Replicate(1, 1, None, None, [], own, [], 0))
    for one in (a, b, c):
        one.helper.look(time.monotonic())
    capture(a.folder, own[0], 0, step(1))
    until(lambda: (a.folder / "bell").exists(), a, b, c)
    capture(a.folder, own[0], 1, step(2))
    capture(a.folder, own[1], 0, step(2))  # step 1 is not whole on this machine
    ring(a.folder)
    until(lambda: len(held(b.folder, own[1])) == 1, a, b, c)
    assert a.heard == [] and held(c.folder, own[0]) == {}
    c.helper.send(Replicate(1, 1, None, None, [], own, [], 0))
    until(says(a, Copied(1, step(2))), a, b, c)
    assert all(held(one.folder, shard) == {0: step(2)} for one in (b, c) for shard in own)


def test_what_is_older_than_the_restored_snapshot_is_not_pushed_but_gives_its_slot(machines):
    """The peer's two slots hold older snapshots; the root says that the newer of them has all its copies."""
    a, b = machines(2)
    for number in (1, 2):
        capture(b.folder, a.shard, number - 1, step(number))
    for number in (2, 3):
        capture(a.folder, a.shard, number - 1, step(number))
    a.replicate([b], generation=2, since=step(3), recoverable=step(2))
    b.replicate([a], generation=2, since=step(3), recoverable=step(2))
    until(says(a, Copied(2, step(3))), a, b)
    assert held(b.folder, a.shard) == {0: step(3), 1: step(2)}


def test_an_own_slot_that_is_damaged_is_void_and_the_agent_hears_of_it_once(machines):
    a, b = machines(2)
    a.capture(1, 0)
    flip(a.folder, a.shard, 0)
    both(a, b)
    until(lambda: a.heard, a, b)
    (found,) = a.heard
    assert isinstance(found, messages.Damaged) and (found.shard, found.identity) == (a.shard, step(1))
    assert "do not fit their checksum" in found.text and os.uname().nodename in found.text
    assert held(a.folder, a.shard) == held(b.folder, a.shard) == {}
    look_after(0.3, a, b)
    assert a.heard == [found]


@pytest.mark.parametrize(
    ("committed", "recoverable", "since", "next_one"),
    [
        ([], None, None, None),
        ([set()], None, None, None),
        ([{step(1), step(2)}], None, None, step(1)),
        ([{step(1), step(2)}, {step(2)}], None, None, step(2)),
        ([{step(1), step(2), step(3)}], step(1), None, step(2)),
        ([{step(1), step(2), step(3)}], step(3), None, None),
        ([{step(1), step(2), step(3)}], None, step(2), step(2)),
        ([{step(3), step(2, 2)}], step(3), step(3), step(2, 2)),
    ],
)
def test_the_next_snapshot_to_push(committed, recoverable, since, next_one):
    assert next_push(committed, recoverable, since) == next_one


def test_rounds_begin_at_least_every_s_apart(machines):
    a, b = machines(2)
    a.replicate([b], every_s=0.5)
    b.replicate([a])
    a.capture(1, 0)
    until(says(a, Copied(1, step(1))), a, b)
    begin = time.monotonic()
    for number in (2, 3):
        a.capture(number, number - 1)
        a.helper.send(Advance(step(number - 1)))
        until(says(a, Copied(1, step(number))), a, b)
    assert time.monotonic() - begin > 0.5


def test_the_bell_wakes_the_replicator(machines):
    """Without it each of these rounds would begin with the next beat, a second after the last one."""
    a, b = machines(2)
    both(a, b)
    until(lambda: (a.folder / "bell").exists(), a, b)
    begin = time.monotonic()
    for number in range(1, 9):
        a.capture(number, number % 3)
        until(says(a, Copied(1, step(number))), a, b)
        a.helper.send(Advance(step(number)))
    assert time.monotonic() - begin < 4.0


def test_a_copy_waits_while_a_trainer_of_this_machine_talks(machines):
    a, b = machines(2)
    a.replicate([b], pages=1)
    b.replicate([a])
    until(lambda: (a.folder / "bell").exists(), a, b)
    board.make(a.folder, 1)  # after Replicate: it is looked for at each round
    board.Page(board.open_board(a.folder), 0, 1).mark(Phase.REDUCTION, 1)
    begin = time.monotonic()
    a.capture(1, 0)
    until(says(a, Copied(1, step(1))), a, b)
    assert time.monotonic() - begin >= 0.02


# --- generations ------------------------------------------------------------------------------------------------------


def test_nothing_is_written_after_silent(machines):
    """In the middle of a large copy, at the receiver and at the sender; then the next generation copies it."""
    a, b = machines(2)
    a.capture(1, 0, BIG)
    a.replicate([b], bytes_per_s=20e6)
    b.replicate([a])

    def begun():
        path = b.folder / f"{a.shard}.0"
        return path.exists() and path.read_bytes()[:8] == format.MAGIC

    until(begun, a, b)
    b.helper.send(Quiet())
    until(says(b, Silent()), a, b)
    before = arena.checksum([memoryview((b.folder / f"{a.shard}.0").read_bytes())])
    assert held(b.folder, a.shard) == {}
    look_after(0.3, a, b)
    assert arena.checksum([memoryview((b.folder / f"{a.shard}.0").read_bytes())]) == before
    a.helper.send(Quiet())
    until(says(a, Silent()), a, b)
    with slot_file(a.folder, a.shard, 0) as file:
        assert file.lock(exclusive=True)  # not pinned any more
    a.replicate([b], generation=2, since=step(1))
    b.replicate([a], generation=2, since=step(1))
    until(says(a, Copied(2, step(1))), a, b)
    assert list(held(b.folder, a.shard).values()) == [step(1)] and troubles(a) == []


def test_a_machine_that_begins_first_waits_for_the_other(machines):
    a, b = machines(2)
    a.capture(1, 0)
    b.replicate([a], generation=1)
    a.replicate([b], generation=2)
    look_after(0.4, a, b)
    assert a.heard == [] and held(b.folder, a.shard) == {}
    b.replicate([a], generation=2)
    until(says(a, Copied(2, step(1))), a, b)


# --- fetch ------------------------------------------------------------------------------------------------------------


def test_a_machine_fetches_what_it_lacks_from_several(machines):
    a, b, c = machines(3)
    capture(b.folder, "rank-00000", 1, step(5), 3_000_000)
    capture(c.folder, "rank-00001", 0, step(5))
    capture(c.folder, "rank-00002", 0, step(5))
    flip(c.folder, "rank-00002", 0)
    gone = Peer("h9", "127.0.0.1", unused_port())
    wanted = [("rank-00000", b.peer), ("rank-00001", c.peer), ("rank-00002", c.peer), ("rank-00003", b.peer)]
    wanted += [("rank-00004", gone)]
    a.helper.send(Fetch(7, [Wanted(shard, step(5), peer) for shard, peer in wanted]))
    until(lambda: a.heard, a, b, c)
    (answer,) = a.heard
    assert isinstance(answer, Fetched) and answer.attempt == 7
    assert {(one.shard, one.source, one.damaged) for one in answer.misses} == {
        ("rank-00002", "h2", True),
        ("rank-00003", "h1", False),
        ("rank-00004", "h9", False),
    }
    (lost,) = [one.text for one in answer.misses if one.source == "h9"]
    assert "Connection refused" in lost and "</dev/tcp/127.0.0.1/" in lost
    assert held(a.folder, "rank-00000") == held(a.folder, "rank-00001") == {0: step(5)}
    a.helper.send(Fetch(8, []))
    until(says(a, Fetched(8, [])), a, b, c)


def test_a_fetch_that_fails_as_nobody_foresaw_is_answered_too(monkeypatch):
    """Else the root would wait for it for ever."""
    peer, wanted = Peer("h1", "127.0.0.1", 1), [Wanted("rank-00000", step(5), Peer("h1", "127.0.0.1", 1))]
    here = SimpleNamespace(
        arena=Path(), connected=lambda _: contextlib.nullcontext(SimpleNamespace(authenticated=True))
    )
    monkeypatch.setattr(transfer, "fetch", lambda *_: 1 / 0)
    shift = Shift(lambda: None)
    Replicator._fetch_from(here, shift, peer, wanted)
    ((miss,),) = [shift.news.get_nowait()]
    assert (miss.shard, miss.identity, miss.source, miss.damaged) == ("rank-00000", step(5), "h1", False)
    assert "ZeroDivisionError" in miss.text


def unused_port():
    with contextlib.closing(wire.listen("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


# --- deaths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_replicator_killed_in_a_copy_is_replaced_and_the_copy_is_made(machines, victim):
    a, b = machines(2)
    a.capture(1, 0, BIG)
    a.replicate([b], bytes_per_s=60e6)
    b.replicate([a])
    until(lambda: (b.folder / f"{a.shard}.0").exists(), a, b)
    one = a if victim == "sender" else b
    pid = one.helper.pid
    os.kill(pid, signal.SIGKILL)
    until(says(a, Copied(1, step(1))), a, b)
    assert list(held(b.folder, a.shard).values()) == [step(1)] and one.helper.pid not in (0, pid)
    (text,) = troubles(one)
    assert text.startswith(f"the replicator on {os.uname().nodename} (pid {pid}) is lost")


def test_a_replicator_that_hangs_is_replaced_with_its_last_orders(machines):
    a, b = machines(2, silence_s=2.5)
    both(a, b)
    a.capture(1, 0)
    until(says(a, Copied(1, step(1))), a, b)
    a.helper.send(Advance(step(1)))
    pid = a.helper.pid
    os.kill(pid, signal.SIGSTOP)
    a.capture(2, 1)
    until(says(a, Copied(1, step(2))), a, b)
    assert a.helper.pid != pid and "silent for" in troubles(a)[0]
    assert set(held(b.folder, a.shard).values()) == {step(1), step(2)}
    a.helper.send(Quiet())
    until(says(a, Silent()), a, b)


def test_a_peer_that_is_gone_is_named_once_and_so_is_its_return(machines):
    a, b = machines(2)
    port = unused_port()
    a.capture(1, 0)
    a.helper.send(Replicate(1, 1, None, None, [a.shard], [], [Peer("h1", "127.0.0.1", port)], 0, 0.0))
    until(lambda: troubles(a), a)
    (text,) = troubles(a)
    assert f"from {os.uname().nodename} to h1 (127.0.0.1:{port}) do not work" in text
    assert "Connection refused" in text and f"</dev/tcp/127.0.0.1/{port}" in text
    with contextlib.closing(wire.listen("127.0.0.1", port)) as listener:
        b.helper = helpers.replicator(
            b.folder, JOB, listener, helpers.secret(TOKEN), Log(), b.selector, 10.0
        )  # of that port
        b.helper.send(Replicate(1, 1, None, None, [], [a.shard], [], 0))
        try:
            until(says(a, Copied(1, step(1))), a, b)
        finally:
            end(b.helper)
    assert len(troubles(a)) == 2 and troubles(a)[1].endswith("work again")


def test_a_peer_that_never_answers_is_named_after_the_first_attempt(machines):
    """Its kernel takes the connection. One attempt takes 10 seconds."""
    (a,) = machines(1)
    a.capture(1, 0)
    with contextlib.closing(wire.listen("127.0.0.1", 0)) as listener:
        peer = Peer("h1", *listener.getsockname())
        a.helper.send(Replicate(1, 1, None, None, [a.shard], [], [peer], 0, 0.0))
        until(lambda: troubles(a), a, seconds=17)
    assert "did not prove within 10 s" in troubles(a)[0]


def test_a_peer_that_is_stopped_in_a_copy_stalls_nothing_for_long(machines):
    """The sender gives the connection up, says so, and copies when the peer goes on."""
    a, b = machines(2, silence_s=100.0)
    a.capture(1, 0, BIG)
    a.replicate([b], bytes_per_s=200e6)
    b.replicate([a])
    until(lambda: (b.folder / f"{a.shard}.0").exists(), a, b)
    os.kill(b.helper.pid, signal.SIGSTOP)
    try:
        until(lambda: troubles(a), a)
    finally:
        os.kill(b.helper.pid, signal.SIGCONT)
    assert "do not work" in troubles(a)[0]
    until(says(a, Copied(1, step(1))), a, b)
    assert troubles(a)[-1].endswith("work again") and held(b.folder, a.shard)


def test_noise_and_strangers_are_refused_and_copies_go_on(machines):
    a, b = machines(2)
    both(a, b)
    until(lambda: (b.folder / "bell").exists(), a, b)
    noise = [socket.create_connection(b.listener.getsockname()) for _ in range(5)]
    for number, sock in enumerate(noise):
        sock.send(os.urandom(1000) if number % 2 else b"GET / HTTP/1.0\r\n\r\n")
    stranger = wire.connect(*b.listener.getsockname(), messages.FROM_KEEPER, b"x" * 32)
    member = wire.connect(*b.listener.getsockname(), messages.FROM_KEEPER, TOKEN)
    with contextlib.closing(stranger), contextlib.closing(member):
        with pytest.raises(wire.Stranger, match="another job's token"):
            stranger.receive_one(FAR_S)
        member.send(Offer(1, 1, b"no header", None))
        with pytest.raises(ConnectionError):
            member.receive_one(FAR_S)
        a.capture(1, 0)
        until(says(a, Copied(1, step(1))), a, b)
    until(lambda: troubles(b), a, b)
    assert all("refused a connection" in text for text in troubles(b)) and len(troubles(b)) < 4
    assert not any("is lost" in text for text in troubles(b))
    for sock in noise:
        sock.close()


# --- the process ------------------------------------------------------------------------------------------------------


def test_the_process_hides_the_token_holds_the_lock_and_ends_with_the_agent(machines):
    (a,) = machines(1)
    until(lambda: (a.folder / "bell").exists(), a)
    proc = Path(f"/proc/{a.helper.pid}")
    assert proc.joinpath("comm").read_text() == "gnn-replicator\n"
    assert TOKEN not in proc.joinpath("cmdline").read_bytes() and TOKEN not in proc.joinpath("environ").read_bytes()
    assert os.fsencode(os.path.realpath(a.folder)) in proc.joinpath("environ").read_bytes()
    assert (a.folder / "bell").stat().st_mode & 0o777 == 0o600
    assert locks.living_trainer(a.folder) == a.helper.pid
    assert "torch" not in proc.joinpath("maps").read_text()
    pid = a.helper.pid
    a.helper._channel.close()  # as the agent's death does
    handle = os.pidfd_open(pid)
    with contextlib.closing(os.fdopen(handle)):
        assert selectors.select.select([handle], [], [], FAR_S)[0]
    a.helper._channel = None


def test_orders_that_still_hold_are_remembered():
    replicate, advance = Replicate(1, 1, None, None, [], [], [], 0), Advance(step(1))
    fetch, fetched = Fetch(1, []), Fetched(1, [])
    orders = []
    for sent, left in [
        (replicate, [replicate]),
        (advance, [replicate, advance]),
        (Advance(step(2)), [replicate, Advance(step(2))]),
        (Copied(1, step(2)), [replicate, Advance(step(2))]),
        (Quiet(), [Quiet()]),
        (Silent(), []),
        (fetch, [fetch]),
        (Fetch(2, []), [Fetch(2, [])]),
        (fetched, []),
        (messages.Persist(step(1), []), [messages.Persist(step(1), [])]),
        (messages.ListCheckpoints(), [messages.Persist(step(1), []), messages.ListCheckpoints()]),
        (messages.Persisted(step(1)), [messages.ListCheckpoints()]),
    ]:
        orders = helpers.remembered(orders, sent)
        assert orders == left


def test_orders_that_nobody_lives_to_carry_out_have_an_answer():
    replicate, advance = Replicate(1, 1, None, None, [], [], [], 0), Advance(step(1))
    wanted = messages.Wanted("rank-00001", step(1), messages.Peer("h1", "10.0.0.1", 9))
    orders = [
        replicate,
        advance,
        Fetch(3, [wanted]),
        messages.Load(4, step(2), ["common"]),
        messages.Persist(step(1), ["common"]),
        messages.Complete(step(1), ["common"]),
        messages.ListCheckpoints(),
    ]
    left, answers = helpers.declined(orders, "why")
    assert left == [replicate, advance]
    assert answers == [
        Fetched(3, [messages.Miss("rank-00001", step(1), "h1", False, "why")]),
        Fetched(4, [messages.Miss("common", step(2), "storage", False, "why")]),
        messages.Persisted(step(1), "why"),
        messages.Completed(step(1), "why"),
        messages.Checkpoints([], [], "why"),
    ]
    waits = [order for order in orders if type(order) in helpers.ANSWERS]
    assert len(answers) == len(waits), "each order that has an answer gets one"
    for answer in answers:
        orders = helpers.remembered(orders, answer)
    assert orders == left


def test_a_fetch_that_kills_each_replicator_fails_instead_of_being_tried_for_ever(machines, monkeypatch):
    (a,) = machines(1)
    monkeypatch.setattr(helpers, "AGAIN_S", (0.0, 0.0))
    a.helper._command = ["gemini_gnn.no_such_module"]  # dies at once
    wanted = messages.Wanted("rank-00001", step(1), messages.Peer("h1", "127.0.0.1", 9))
    replicate = Replicate(1, 1, None, None, [], [], [], 0)
    a.helper.send(replicate)
    a.helper.send(Fetch(7, [wanted]))
    until(lambda: any(isinstance(one, Fetched) for one in a.heard), a)
    (fetched,) = [one for one in a.heard if isinstance(one, Fetched)]
    (miss,) = fetched.misses
    assert (fetched.attempt, miss.shard) == (7, "rank-00001") and "for the 5th time in a row" in miss.text
    assert len(troubles(a)) == helpers.DEATHS and a.helper._orders == [replicate]


# --- pace -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    board.make(tmp_path, 1)
    return board.open_board(tmp_path), board.Page(board.open_board(tmp_path), 0, 1)


def test_a_chunk_waits_for_the_end_of_a_burst(page):
    view, writer = page
    pace = Pace(0.0, threading.Event())
    pace.look = (view, 1)
    writer.mark(Phase.REDUCTION, 1)
    begin = time.monotonic()
    pace.gate()(1000)
    assert time.monotonic() - begin >= 0.02  # a burst that does not end is not waited for
    timer = threading.Timer(0.003, writer.mark, [Phase.FORWARD])
    timer.start()
    pace.gate()(1000)
    assert not pace.talks() and pace.sent_bytes == 2000
    timer.join()


def test_waits_for_bursts_are_at_most_half_of_the_time(page, monkeypatch):
    """And one wait before it. Each chunk takes a millisecond; the burst never ends."""
    view, writer = page
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Stop(threading.Event):
        def wait(self, seconds=None):
            clock[0] += seconds
            return False

    pace = Pace(0.0, Stop())
    pace.look = (view, 1)
    writer.mark(Phase.AGREEMENT, 1)
    gate, begin = pace.gate(), clock[0]
    for _ in range(1000):
        gate(1000)
        clock[0] += 0.001
    assert 1.9 < clock[0] - begin < 2.05


def test_a_limit_holds_for_all_threads_together(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Stop(threading.Event):
        def wait(self, seconds=None):
            clock[0] += seconds
            return False

    pace = Pace(1e6, Stop())
    gates = [pace.gate(), pace.gate()]
    for number in range(100):
        gates[number % 2](10_000)
    assert 0.98 < clock[0] - 100.0 < 1.0
