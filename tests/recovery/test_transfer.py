"""Shards between two arenas, over real loopback sockets: one end in a thread, the other here."""

import contextlib
import errno
import os
import socket
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini_gnn.recovery import messages, transfer, wire
from gemini_gnn.recovery.transfer import Order, Slots
from gemini_gnn.recovery.wire import Wire
from gemini_gnn.snapshot.store import arena, format
from gemini_gnn.snapshot.store.format import SlotState
from tests.recovery.arenas import JOB, arena_folder, capture, flip, held, slot_file, step

TOKEN = b"t" * 32
FAR_S = 20.0
SHARD = "rank-00003"
PEER = messages.Peer("h1", "127.0.0.1", 1)


@pytest.fixture
def here():
    with arena_folder() as path:
        yield path


@pytest.fixture
def there():
    with arena_folder() as path:
        yield path


def order(generation=1, kept=(SHARD,), recoverable=None):
    return Order(1, generation, kept, recoverable)


def free(nbytes):
    """A gate that is open."""


def pairs():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for sock in (ours, theirs):
        wire._tune(sock)
    return ours, theirs


@contextlib.contextmanager
def peer(folder, its_order, way=None):
    """A wire to a replicator that keeps and serves; ``way(data)`` is done to all bytes that go to it."""
    ours, theirs = pairs()
    ends = [ours, theirs]
    if way is not None:
        (ours, far), (near, theirs) = pairs(), (ours, theirs)
        ends += [ours, far]

    def answer():
        slots = Slots(folder)
        try:
            with contextlib.closing(Wire(theirs, messages.TO_KEEPER, TOKEN, opens=False)) as one:
                while True:
                    message = one.receive_one(FAR_S)
                    if isinstance(message, messages.Offer):
                        transfer.keep(one, message, its_order, slots, JOB)
                    else:
                        transfer.serve(one, message, slots, free)
        except (OSError, ValueError) as error:
            ends.append(error)
        finally:
            slots.close()

    def carry():
        for sock in (far, near):
            sock.settimeout(FAR_S)
        back = threading.Thread(target=copy, args=(near, far, bytes))
        back.start()
        copy(far, near, way)
        back.join(FAR_S)

    threads = [threading.Thread(target=answer)] + ([threading.Thread(target=carry)] if way is not None else [])
    for thread in threads:
        thread.start()
    try:
        with contextlib.closing(Wire(ours, messages.FROM_KEEPER, TOKEN, opens=True)) as one:
            yield one
    finally:
        for sock in ends:
            if isinstance(sock, socket.socket):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(FAR_S)
            assert not thread.is_alive()
        for sock in ends:
            if isinstance(sock, socket.socket):
                sock.close()


def copy(source, sink, way):
    """Until one of the two is closed, or ``way`` says None."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            changed = way(data)
            if changed is None:
                break
            sink.sendall(changed)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def pushed(one, folder, identity, its_order=None):
    with contextlib.closing(Slots(folder)) as slots:
        return transfer.push(one, slots, SHARD, identity, its_order or order(), free)


# --- raw bytes on a wire ----------------------------------------------------------------------------------------------


def test_raw_bytes_follow_a_message_and_stay_raw():
    """Bytes that look like lines, of which some came with the message before; then a message again."""
    a, b = pairs()
    raw = (b"\n" * 100 + os.urandom(1000)) * 1000
    got = bytearray(len(raw))
    with (
        contextlib.closing(Wire(a, [messages.Say], TOKEN, opens=True)) as one,
        contextlib.closing(Wire(b, [messages.Say], TOKEN, opens=False)) as two,
    ):

        def send():
            one.send(messages.Say("before"))
            one.receive_one(FAR_S)
            one.send(messages.Say("with"))
            one.send_bytes(memoryview(raw), FAR_S)
            one.send(messages.Say("after"), FAR_S)

        thread = threading.Thread(target=send)
        thread.start()
        assert two.receive_one(FAR_S) == messages.Say("before")
        two.send(messages.Say("go"))
        assert two.receive_one(FAR_S) == messages.Say("with")
        two.receive_bytes(memoryview(got), FAR_S)
        assert bytes(got) == raw and two.receive_one(FAR_S) == messages.Say("after")
        thread.join(FAR_S)


def test_bytes_that_come_slowly_are_no_stall():
    """Few come in each wait, fewer than a receiver is woken for."""
    a, b = pairs()
    with (
        contextlib.closing(Wire(a, [messages.Say], TOKEN, opens=True)) as one,
        contextlib.closing(Wire(b, [messages.Say], TOKEN, opens=False)) as two,
    ):
        one.receive(), two.receive(), one.receive(), two.receive()
        pause = threading.Event()

        def send():
            for _ in range(8):
                one.send_bytes(memoryview(bytes(1000)), FAR_S)
                pause.wait(0.05)

        thread = threading.Thread(target=send)
        thread.start()
        two.receive_bytes(memoryview(bytearray(8000)), 0.15)
        thread.join(FAR_S)


def test_waits_end_at_their_time_and_with_the_connection():
    a, b = pairs()
    with contextlib.closing(Wire(a, [messages.Say], TOKEN, opens=True)) as one:
        two = Wire(b, [messages.Say], TOKEN, opens=False)
        with pytest.raises(TimeoutError, match="has not moved a byte"):
            one.receive_one(0.05)  # before the handshake
        two.receive()
        one.receive()
        two.receive()
        assert one.authenticated and two.authenticated
        with pytest.raises(TimeoutError):
            one.receive_one(0.05)
        with pytest.raises(TimeoutError):
            one.receive_bytes(memoryview(bytearray(10)), 0.05)
        with pytest.raises(TimeoutError):  # nobody reads
            one.send_bytes(memoryview(bytes(64 << 20)), 0.05)
        two.close()
        for wait in (lambda: one.receive_one(FAR_S), lambda: one.receive_bytes(memoryview(bytearray(10)), FAR_S)):
            with pytest.raises(ConnectionError):
                wait()


# --- push and keep ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [2, 20_000, 3_000_000])
def test_a_shard_is_kept_and_verified(here, there, nbytes):
    header = capture(here, SHARD, 2, step(1), nbytes)
    with peer(there, order()) as one:
        assert pushed(one, here, step(1)) == messages.Kept()
    assert held(there, SHARD) == {0: step(1)}
    with slot_file(there, SHARD, 0) as file:
        kept = file.header()
    assert replace(kept, slot=2, committed_ns=0) == replace(header, committed_ns=0) and kept.committed_ns


def test_a_peer_that_has_it_is_sent_nothing(here, there):
    capture(here, SHARD, 0, step(1))
    sent = []
    with peer(there, order()) as one, contextlib.closing(Slots(here)) as slots:
        for _ in range(3):
            assert transfer.push(one, slots, SHARD, step(1), order(), sent.append) == messages.Kept()
    assert len(sent) == 1


def test_a_damaged_copy_is_not_taken_for_a_good_one(here, there):
    capture(here, SHARD, 0, step(1))
    with peer(there, order()) as one:
        pushed(one, here, step(1))
        flip(there, SHARD, 0)
        assert pushed(one, here, step(1)) == messages.Kept()
    assert list(held(there, SHARD).values()) == [step(1)]


def test_a_damaged_slot_is_not_kept(here, there):
    capture(here, SHARD, 0, step(1))
    flip(here, SHARD, 0)
    with peer(there, order()) as one:
        answer = pushed(one, here, step(1))
    assert (isinstance(answer, messages.NotKept) and "does not fit" in answer.text) or "do not fit" in answer.text
    assert held(there, SHARD) == {}


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (None, messages.Later),
        (order(generation=0), messages.Later),
        (order(generation=2), messages.Later),
        (order(kept=("rank-00004",)), messages.NotKept),
    ],
)
def test_what_is_not_wanted_now_is_not_taken(here, there, theirs, said):
    capture(here, SHARD, 0, step(1))
    with peer(there, theirs) as one:
        answer = pushed(one, here, step(1))
    assert isinstance(answer, said) and os.uname().nodename in answer.text and not list(there.iterdir())


def test_the_slot_of_the_recoverable_snapshot_is_never_overwritten(here, there):
    """Two foreign slots: the third snapshot finds room once the second is recoverable."""
    for number in (1, 2, 3):
        capture(here, SHARD, number - 1, step(number))
    with peer(there, order()) as one:
        assert pushed(one, here, step(1)) == pushed(one, here, step(2)) == messages.Kept()
        for recoverable in (None, step(1)):
            answer = pushed(one, here, step(3), order(recoverable=recoverable))
            assert isinstance(answer, messages.Later) and "free slot" in answer.text
        assert held(there, SHARD) == {0: step(1), 1: step(2)}
        assert pushed(one, here, step(3), order(recoverable=step(2))) == messages.Kept()  # as the sender knows
    assert held(there, SHARD) == {0: step(3), 1: step(2)}
    capture(here, SHARD, 0, step(4))
    with peer(there, order(recoverable=step(3))) as one:  # as the receiver knows
        assert pushed(one, here, step(4)) == messages.Kept()
    assert held(there, SHARD) == {0: step(3), 1: step(4)}


def test_a_slot_that_is_read_is_left_alone(here, there):
    for number in (1, 2, 3):
        capture(here, SHARD, number - 1, step(number))
    with peer(there, order(recoverable=step(2))) as one:
        pushed(one, here, step(1)), pushed(one, here, step(2))
        with slot_file(there, SHARD, 0) as reader:
            assert reader.lock(exclusive=False)
            assert isinstance(pushed(one, here, step(3)), messages.Later)
        assert pushed(one, here, step(3)) == messages.Kept()


def test_the_owner_cannot_overwrite_a_slot_before_the_answer(here, there):
    capture(here, SHARD, 0, step(1))
    locked = []

    def look(nbytes):
        with slot_file(here, SHARD, 0) as trainer:
            locked.append(trainer.lock(exclusive=True))

    with peer(there, order()) as one, contextlib.closing(Slots(here)) as slots:
        assert transfer.push(one, slots, SHARD, step(1), order(), look) == messages.Kept()
        assert locked == [False]
        look(0)
        assert locked == [False, True]


def test_a_slot_that_was_overwritten_meanwhile_is_not_pushed(here, there):
    capture(here, SHARD, 0, step(2))
    with peer(there, order()) as one:
        assert isinstance(pushed(one, here, step(1)), messages.Later)


def test_the_header_is_read_again_under_the_lock(here, there, monkeypatch):
    """The owner begins to write just before the lock is taken."""
    header = capture(here, SHARD, 0, step(1))
    lock = arena.SlotFile.lock

    def late(file, exclusive):
        if not exclusive:
            file.write_header(replace(header, state=SlotState.WRITING, identity=step(4)))
        return lock(file, exclusive)

    with peer(there, order()) as one, monkeypatch.context() as patch:
        patch.setattr(arena.SlotFile, "lock", late)
        assert isinstance(pushed(one, here, step(1)), messages.Later)
    assert not list(there.iterdir())


@pytest.mark.parametrize("sizes", [(20_000, 3_000_000), (3_000_000, 20_000)])
def test_a_foreign_slot_of_another_layout_is_used(here, there, sizes):
    with peer(there, order(recoverable=step(9))) as one:
        for number, nbytes in enumerate(sizes):
            capture(there, SHARD, 0, step(number), sizes[0])
            capture(there, SHARD, 1, step(number), sizes[0])
            capture(here, SHARD, 0, step(8), nbytes)
            assert pushed(one, here, step(8)) == messages.Kept()
            assert step(8) in held(there, SHARD).values()


def test_a_tail_that_outgrew_its_room(here, there):
    capture(here, SHARD, 0, step(1), tail=os.urandom(3 * format.TAIL_ROOM))
    with peer(there, order()) as one:
        assert pushed(one, here, step(1)) == messages.Kept()
    assert held(there, SHARD) == {0: step(1)}


def test_no_room_names_machine_and_bytes(here, there, monkeypatch):
    capture(here, SHARD, 0, step(1))
    capture(there, SHARD, 0, step(0))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, peer(there, order(recoverable=step(9))) as one:
        patch.setattr(os, "posix_fallocate", full)
        patch.setattr(arena, "room", lambda _: arena.Room(1000, "the size of /dev/shm", "make it larger"))
        answer = pushed(one, here, step(1))
    assert isinstance(answer, messages.NotKept)
    assert os.uname().nodename in answer.text and "available are 1.0 KB" in answer.text and "need 1.1 MB" in answer.text
    assert held(there, SHARD) == {0: step(0)}


# --- on the way -------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(share=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["cut", "flip", "put in", "drop"]))
def test_what_is_changed_on_the_way_is_never_kept(share, kind):
    """At any byte of the stream: the older copy stays, and a new one is whole or counts as nothing."""
    with arena_folder() as here, arena_folder() as there:
        capture(here, SHARD, 0, step(2), 50_000)
        capture(there, SHARD, 0, step(1), 50_000)
        capture(there, SHARD, 1, step(0), 50_000)  # is overwritten
        at, passed = int(share * 56_000), 0

        def way(data):
            nonlocal passed
            first, passed = passed, passed + len(data)
            if not first <= at < passed:
                return data
            place = at - first
            changed = {
                "cut": None,
                "flip": data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :],
                "put in": data[:place] + b"x" + data[place:],
                "drop": data[:place] + data[place + 1 :],
            }
            return changed[kind]

        answer, stall_s = None, transfer.STALL_S
        transfer.STALL_S = 0.3  # a byte that is lacking is waited for
        try:
            with peer(there, order(recoverable=step(2)), way) as one, contextlib.suppress(OSError, ValueError):
                answer = pushed(one, here, step(2))
        finally:
            transfer.STALL_S = stall_s
        found = held(there, SHARD)  # each is verified
        assert found[0] == step(1) and found.get(1) in (step(0), step(2), None)
        if isinstance(answer, messages.Kept):
            assert step(2) in found.values()


NAMES = st.sampled_from(["../../etc/passwd", "", "/", "rank-00003", "common", "agent.lock", "\0", "é"])
HEADERS = st.binary(max_size=400) | st.builds(
    lambda shard, state, tail, size: format.encode_header(
        format.Header(state, step(1), 0, shard, 0, JOB, bytes(16), 0, bytes(16), tail, size)
    ),
    NAMES.filter(lambda name: "\0" not in name),
    st.sampled_from(SlotState),
    st.sampled_from([0, 1, 4096, 1 << 40, 1 << 60, 2**64 - 1]),
    st.sampled_from([0, 1, 1 << 40, 1 << 63]),
)


@settings(max_examples=60)
@given(
    message=st.builds(messages.Offer, st.integers(0, 2), st.integers(0, 2), HEADERS, st.none())
    | st.builds(messages.Ask, NAMES, st.just(step(1)))
)
def test_malformed_offers_and_requests_are_refused_and_harmless(message):
    with arena_folder() as there:
        capture(there, SHARD, 0, step(1))
        capture(there, SHARD, 1, step(2))
        with peer(there, order()) as one:
            one.send(message)
            with contextlib.suppress(ConnectionError):
                answer = one.receive_one(FAR_S)
                assert not isinstance(answer, messages.Kept | messages.Go)
                assert isinstance(answer, messages.Serve) == (message == messages.Ask(SHARD, step(1)))
        assert held(there, SHARD) == {0: step(1), 1: step(2)}
        assert {path.name for path in there.iterdir()} == {f"{SHARD}.0", f"{SHARD}.1"}


def test_a_shard_of_another_job_is_refused(here, there):
    capture(here, SHARD, 0, step(1), job="other")
    with peer(there, order()) as one:
        assert isinstance(pushed(one, here, step(1)), messages.NotKept)


# --- fetch ------------------------------------------------------------------------------------------------------------


def fetched(one, folder, identity):
    with contextlib.closing(Slots(folder)) as slots:
        return transfer.fetch(one, messages.Wanted(SHARD, identity, PEER), slots)


def test_a_shard_is_fetched_into_a_free_slot(here, there):
    capture(there, SHARD, 1, step(5), 3_000_000)
    capture(here, SHARD, 0, step(4))
    with peer(there, None) as one:
        assert fetched(one, here, step(5)) is None
    found = held(here, SHARD)
    assert found == {0: step(4), 1: step(5)}


def test_a_shard_that_is_here_and_whole_is_not_fetched(here, there):
    capture(here, SHARD, 2, step(5))
    with peer(there, None) as one:
        assert fetched(one, here, step(5)) is None
    assert held(here, SHARD) == {2: step(5)}


def test_a_damaged_own_copy_is_replaced(here, there):
    capture(there, SHARD, 0, step(5))
    capture(here, SHARD, 1, step(5))
    flip(here, SHARD, 1)
    with peer(there, None) as one:
        assert fetched(one, here, step(5)) is None
    assert list(held(here, SHARD).values()) == [step(5)]


def test_a_copy_that_is_lacking_or_damaged_is_named(here, there):
    capture(there, SHARD, 0, step(5))
    with peer(there, None) as one:
        miss = fetched(one, here, step(6))
        assert (miss.shard, miss.identity, miss.source, miss.damaged) == (SHARD, step(6), "h1", False)
        assert f"does not have '{SHARD}' of 1-1-6" in miss.text
        flip(there, SHARD, 0)
        miss = fetched(one, here, step(5))
        assert miss.damaged and "from h1 is damaged" in miss.text and held(here, SHARD) == {}


def test_a_fetch_takes_a_free_slot_then_an_older_then_the_newest(here, there):
    """What is newer is voided when the job goes back; the older second chance goes only where there is no other slot."""
    capture(there, SHARD, 0, step(5))
    for slot, number in enumerate((6, 7, 8)):
        capture(here, SHARD, slot, step(number))
    with peer(there, None) as one:
        assert fetched(one, here, step(5)) is None
        assert held(here, SHARD) == {0: step(6), 1: step(7), 2: step(5)}
        capture(here, SHARD, 2, step(4))
        assert fetched(one, here, step(5)) is None
        assert held(here, SHARD) == {0: step(6), 1: step(7), 2: step(5)}


def test_a_fetch_that_finds_nothing_costs_no_copy(here, there):
    for slot, number in enumerate((3, 4, 8)):
        capture(here, SHARD, slot, step(number))
    with peer(there, None) as one:
        assert fetched(one, here, step(5)) is not None
    assert held(here, SHARD) == {0: step(3), 1: step(4), 2: step(8)}


def test_slots_that_others_read_are_not_fetched_into(here, there):
    capture(there, SHARD, 0, step(5))
    with peer(there, None) as one, contextlib.ExitStack() as stack:
        for slot in range(3):
            capture(here, SHARD, slot, step(slot))
            assert stack.enter_context(slot_file(here, SHARD, slot)).lock(exclusive=False)
        miss = fetched(one, here, step(5))
        assert "other processes read them" in miss.text and not miss.damaged
    assert held(here, SHARD) == {0: step(0), 1: step(1), 2: step(2)}


def test_names_of_shards_are_never_paths():
    for name in ("../x", "/x", "", "x/y", ".", "é", "x\0"):
        assert not transfer._is_name(name)
    assert transfer._is_name("rank-00001") and transfer._is_name("common")
    with pytest.raises(ValueError, match="committed slot"):
        transfer._header(b"")
