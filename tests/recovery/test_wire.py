"""Connections between agents, on real loopback sockets."""

import contextlib
import errno
import os
import re
import select
import selectors
import socket
import struct
import threading
import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini_gnn.errors import ClusterError
from gemini_gnn.recovery import messages, wire
from gemini_gnn.recovery.messages import Say
from gemini_gnn.recovery.wire import Wire

TOKEN, OTHER = b"t" * 32, b"o" * 32
FAR_S = 20.0  # deadline of every wait
EXPECTS = (Say, messages.Task)


@pytest.fixture
def opened():
    """Closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda one: stack.enter_context(contextlib.closing(one))


def tcp():
    """The two ends of a connection, not blocking: of the one that opened it, of the one that listened."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for sock in (ours, theirs):
        wire._tune(sock)
    return ours, theirs


def wires(opened, *, tokens=(TOKEN, TOKEN), within_s=FAR_S):
    a, b = tcp()
    return (
        opened(Wire(a, EXPECTS, tokens[0], opens=True, within_s=within_s)),
        opened(Wire(b, EXPECTS, tokens[1], opens=False, within_s=within_s)),
    )


def receive_until(done, *all_wires):
    """What each has received until ``done``; wakes up only when a selector would."""
    heard = [[] for _ in all_wires]
    deadline = time.monotonic() + FAR_S
    while not done(heard):
        left_s = deadline - time.monotonic()
        assert left_s > 0, (heard, [one.complaint for one in all_wires])
        select.select([one for one in all_wires if not one.closed], [], [], left_s)
        for one, of_it in zip(all_wires, heard, strict=True):
            of_it += one.receive()
    return heard


def shake(a, b):
    receive_until(lambda _: a.authenticated and b.authenticated, a, b)


def until_closed(*all_wires):
    heard = receive_until(lambda _: all(one.closed for one in all_wires), *all_wires)
    assert not any(heard)
    return [str(one.complaint) for one in all_wires]


def sent_by(sock):
    """What comes on a raw socket until nothing more is there at once."""
    select.select([sock], [], [], FAR_S)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := sock.recv(1 << 16):
            data += chunk
    return data


# --- a good connection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_two_agents_talk(opened, address):
    listener = opened(wire.listen(address, 0))
    port = listener.getsockname()[1]
    assert wire.accept(listener, EXPECTS, TOKEN) is None
    a = opened(wire.connect(address, port, EXPECTS, TOKEN))
    select.select([listener], [], [], FAR_S)
    b = opened(wire.accept(listener, EXPECTS, TOKEN))
    assert a.peer == (f"[::1]:{port}" if ":" in address else f"127.0.0.1:{port}")
    assert a.send(Say("early")) and b.send(Say("early, too")) and not a.authenticated
    got_a, got_b = receive_until(lambda heard: all(heard), a, b)
    assert a.authenticated and b.authenticated and (got_a, got_b) == ([Say("early, too")], [Say("early")])
    for number in range(3):
        assert a.send(Say(f"{number}")) and b.send(Say("x" * 100_000))
    got_a, got_b = receive_until(lambda heard: all(len(one) == 3 for one in heard), a, b)
    assert got_a == [Say("x" * 100_000)] * 3 and got_b == [Say("0"), Say("1"), Say("2")]
    for one in (a, b):
        assert one.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert one.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert one.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == wire.UNANSWERED_S * 1000
    a.close()
    assert until_closed(b) == ["None"]


def test_a_loop_that_looks_only_for_readable_descriptors_does_everything(opened):
    """Also the connect, the handshake, and a message longer than the kernel's buffers, by one number per wire."""
    listener = opened(wire.listen("127.0.0.1", 0))
    a = opened(wire.connect(*listener.getsockname(), EXPECTS, TOKEN))
    number = a.fileno()
    select.select([listener], [], [], FAR_S)
    b = opened(wire.accept(listener, EXPECTS, TOKEN))
    long = Say("x" * 12_000_000)
    a.send(long)
    heard = []
    with selectors.DefaultSelector() as selector:
        selector.register(a, selectors.EVENT_READ)
        selector.register(b, selectors.EVENT_READ)
        deadline = time.monotonic() + FAR_S
        while not heard:
            assert time.monotonic() < deadline
            for key, _ in selector.select(FAR_S):
                heard += key.fileobj.receive()
    assert heard == [long] and a.fileno() == number
    assert not select.select([a], [], [], 0)[0]  # nothing waits: no busy loop
    a.close()
    assert a.fileno() == -1
    a.close()


def test_a_handshake_may_come_byte_by_byte(opened):
    (a, far_a), (far_b, b) = tcp(), tcp()
    a = opened(Wire(a, EXPECTS, TOKEN, opens=True, within_s=FAR_S))
    b = opened(Wire(b, EXPECTS, TOKEN, opens=False, within_s=FAR_S))
    opened(far_a), opened(far_b)
    a.send(Say("last"))
    heard = []
    deadline = time.monotonic() + FAR_S
    while not heard:
        assert time.monotonic() < deadline
        assert a.receive() == []
        for source, sink, one in ((far_a, far_b, b), (far_b, far_a, a)):
            with contextlib.suppress(BlockingIOError):
                sink.send(source.recv(1))
                heard += one.receive()
    assert heard == [Say("last")] and a.authenticated and b.authenticated


def test_a_version_without_proof_is_only_another_job(opened, monkeypatch):
    """Nobody can make agents think that they are of different versions."""
    a, b = tcp()
    this = opened(Wire(b, EXPECTS, TOKEN, opens=False))
    other = in_version(monkeypatch, "0.0.9", 1, lambda: opened(Wire(a, EXPECTS, OTHER, opens=True)))
    for text in until_closed(this, other):
        assert "has another job's token" in text


# --- not of this job --------------------------------------------------------------------------------------------------


def test_another_jobs_token_is_refused_by_both_ends(opened):
    a, b = wires(opened, tokens=(TOKEN, OTHER))
    a.send(Say("secret"))
    for text in until_closed(a, b):
        assert re.fullmatch(r"127\.0\.0\.1:\d+ has another job's token.*--master_port N.*MASTER_PORT=N.*", text)
    assert not a.send(Say("more")) and not (a.authenticated or b.authenticated)


def in_version(monkeypatch, number, protocol, one):
    """Do ``one()`` as if this installation were of another version."""
    with monkeypatch.context() as patch:
        patch.setattr(wire, "version", lambda: number)
        patch.setattr(messages, "PROTOCOL", protocol)
        return one()


@pytest.mark.parametrize("older_opens", [True, False])
@pytest.mark.parametrize(
    ("number", "protocol"), [("0.0.9", messages.PROTOCOL), (wire.version(), messages.PROTOCOL - 1)]
)
def test_another_version_is_named_by_both_ends(opened, monkeypatch, number, protocol, older_opens):
    ours, theirs = reversed(tcp()) if older_opens else tcp()
    this = opened(Wire(ours, EXPECTS, TOKEN, opens=not older_opens))
    older = partial(in_version, monkeypatch, number, protocol)
    that = older(lambda: opened(Wire(theirs, EXPECTS, TOKEN, opens=older_opens)))
    that.receive = partial(older, that.receive)
    until_closed(this, that)
    old, new = f"{number} (protocol {protocol})", f"{wire.version()} (protocol {messages.PROTOCOL})"
    here, end = os.uname().nodename, "use the same installation on all machines"
    assert str(this.complaint) == f"{this.peer} runs gemini_gnn {old}, {here} runs {new}: {end}"
    assert str(that.complaint) == f"{that.peer} runs gemini_gnn {new}, {here} runs {old}: {end}"
    assert isinstance(this.complaint, wire.OtherVersion) and isinstance(that.complaint, wire.OtherVersion)


OUR_HELLO = f"gemini_gnn {messages.PROTOCOL} {wire.version()} ".encode()
TLS_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(180)


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: h1\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        TLS_HELLO,
        b"\n",
        b"\0",
        b'{"kind": "say"}\n',
        b"gemini_gnn \n",
        b"gemini_gnn 1\n",
        b"gemini_gnn " + b"9" * 5000,
        OUR_HELLO + b"\xff\n",
    ],
)
def test_what_is_no_agent_is_refused(opened, opens, said):
    ours, theirs = tcp() if opens else reversed(tcp())
    one = opened(Wire(ours, EXPECTS, TOKEN, opens=opens, within_s=FAR_S))
    opened(theirs).send(said)
    (text,) = until_closed(one)
    assert f"{one.peer} is no agent of gemini_gnn" in text


def test_an_agent_that_connects_to_itself_is_refused(opened):
    """The kernel does that if the number it draws for our end is the port that nobody listens on yet."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.connect(sock.getsockname())
    assert "is no agent" in until_closed(opened(Wire(sock, EXPECTS, TOKEN, opens=True)))[0]


def test_nobody_there(opened):
    listener = wire.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    one = opened(wire.connect("127.0.0.1", port, EXPECTS, TOKEN))
    (text,) = until_closed(one)
    assert f"cannot reach an agent at 127.0.0.1:{port}: Connection refused" in text
    assert f"</dev/tcp/127.0.0.1/{port}'" in text and one.fileno() >= 0
    for name in ("h1.invalid", "h1..invalid"):
        unknown = opened(wire.connect(name, port, EXPECTS, TOKEN))
        assert unknown.closed and f"{name}:{port}: " in str(unknown.complaint) and unknown.receive() == []


def test_a_machine_that_does_not_answer(opened):
    """A listener with a full backlog: the kernel drops what comes then, as a firewall would."""
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        one = opened(Wire(sock, EXPECTS, TOKEN, opens=True, within_s=0.0))
        assert one.receive() == [] and one.closed and "no answer for 0 s" in str(one.complaint)


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("said", [b"", OUR_HELLO[:14]])
def test_a_peer_that_stops_in_the_handshake_is_closed(opened, opens, said):
    ours, theirs = tcp() if opens else reversed(tcp())
    opened(theirs).send(said)
    patient = opened(Wire(ours, EXPECTS, TOKEN, opens=opens, within_s=FAR_S))
    assert patient.receive() == [] and not patient.closed and patient.complaint is None
    patient._deadline = 0.0
    assert patient.receive() == [] and patient.closed
    assert f"{patient.peer} did not prove within 20 s that it is of this job" in str(patient.complaint)


@pytest.mark.parametrize("opens", [True, False])
def test_a_peer_that_goes_in_the_handshake(opened, opens):
    ours, theirs = tcp() if opens else reversed(tcp())
    one = opened(Wire(ours, EXPECTS, TOKEN, opens=opens, within_s=FAR_S))
    theirs.shutdown(socket.SHUT_WR)  # half open: it could still read
    opened(theirs)
    (text,) = until_closed(one)
    assert "end of stream" in text and one.peer in text


def test_a_peer_that_goes_while_we_prove_ourselves(opened):
    """Its proof was good, but it will not hear ours."""
    (near, far), (far_b, b) = tcp(), tcp()
    a, b = opened(Wire(near, EXPECTS, TOKEN, opens=True)), opened(Wire(b, EXPECTS, TOKEN, opens=False))
    a.receive()
    opened(far_b).send(sent_by(far))
    b.receive()
    far.send(sent_by(far_b))
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    assert "cannot reach an agent" in until_closed(a)[0] and not a.authenticated


# --- nobody makes us wait or keep much --------------------------------------------------------------------------------


def test_a_peer_that_does_not_run_is_busy_its_kernel_acknowledges(opened):
    """Also what it does not read."""
    a, b = wires(opened)
    shake(a, b)
    deadline = time.monotonic() + FAR_S
    for _ in range(3):
        assert a.send(Say("are you there?"))
        while a.unacknowledged_s() > 0.0:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert not wire.is_silent(a, 3.9, 1.0) and wire.is_silent(a, 4.1, 1.0)
    a.sock.close()
    assert wire.is_silent(a, 1.1, 1.0) and not wire.is_silent(a, 0.9, 1.0)


def test_a_machine_that_is_gone_acknowledges_nothing(opened):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:  # the kernel answers one connection, and no more
        where = full.getsockname()
        with socket.create_connection(where, timeout=FAR_S):
            gone = opened(wire.connect(*where, EXPECTS, TOKEN))
            assert not wire.is_silent(gone, 1.1, 1.0), "it counts from this look"
            assert not gone.is_connected
            deadline = time.monotonic() + FAR_S
            while gone.unacknowledged_s() <= 0.5:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert wire.is_silent(gone, 1.1, 1.0) and not wire.is_silent(gone, 0.9, 1.0)


def test_one_without_proof_can_make_us_keep_little(opened):
    theirs, ours = tcp()
    one = opened(Wire(ours, EXPECTS, TOKEN, opens=False, within_s=FAR_S))
    opened(theirs).send(OUR_HELLO)
    most, deadline = 0, time.monotonic() + FAR_S
    while not one.closed:
        assert time.monotonic() < deadline
        with contextlib.suppress(BlockingIOError):
            theirs.send(b"a" * 1000)
        assert one.receive() == []
        most = max(most, len(one._received))
    assert most < wire.HANDSHAKE_BYTES and "is no agent" in str(one.complaint) and not one._received


def test_what_waits_for_the_handshake_is_bounded(opened):
    a, _ = wires(opened)
    sent = 0
    while a.send(Say("x" * 1_000_000)):
        sent += 1
        assert sent < 20
    assert sent == 16 and a.closed and f"{a.peer} does not read" in str(a.complaint)


def test_a_peer_that_never_reads_makes_nobody_wait(opened):
    a, b = wires(opened)
    shake(a, b)
    begin, sent = time.monotonic(), 0
    while a.send(Say("x" * 1_000_000)):
        sent += 1
        assert sent < 100 and a.receive() == []
    assert a.closed and "does not read" in str(a.complaint) and time.monotonic() - begin < FAR_S
    assert len(a._unsent) <= messages.MAX_MESSAGE_BYTES


def test_one_can_wait_until_the_kernel_has_a_message(opened):
    a, b = wires(opened)
    shake(a, b)
    while not a._unsent:
        assert a.send(Say("x" * 1_000_000))
    assert a.send(Say("slow"), timeout_s=0.01) and a._unsent  # nobody reads: it still goes, later
    heard = []

    def read():
        while Say("last") not in heard:
            heard.extend(b.wait(FAR_S) or [None])

    reader = threading.Thread(target=read)
    reader.start()
    assert a.send(Say("last"), timeout_s=FAR_S) and not a._unsent
    reader.join(FAR_S)
    assert heard[-2:] == [Say("slow"), Say("last")]


def test_a_peer_that_never_stops_sending_keeps_nobody_in_receive(opened):
    """It gives out what is complete after a while, and no number of small messages is one too long."""
    a, b = wires(opened)
    shake(a, b)
    text, heard = "x" * 100_000, []
    sent = sum(a.send(Say(text)) for _ in range(150))
    plain_recvmsg = b.sock.recvmsg

    class Flood:
        """The socket of ``b``, always with something to read."""

        def recvmsg(self, *arguments):
            with contextlib.suppress(BlockingIOError):
                return plain_recvmsg(*arguments)
            a.receive()
            select.select([real], [], [], FAR_S)
            return plain_recvmsg(*arguments)

    real, b.sock = b.sock, Flood()
    calls = 0
    while len(heard) < sent - 12:  # the last ones may come without a next one behind them
        calls += 1
        heard += b.receive()
        assert b.complaint is None
    b.sock = real
    assert sent == 150 and calls > 5 and set(heard) == {Say(text)}


def test_a_message_with_descriptors_stays_on_its_machine(opened):
    a, _ = wires(opened)
    with pytest.raises(AssertionError, match="descriptors"):
        a.send(messages.Fork([0]))


# --- on the way -------------------------------------------------------------------------------------------------------

SAID = [Say(f"{number} " + "x" * 20) for number in range(4)]


def session(to_opener=lambda stream: stream, to_listener=lambda stream: stream):
    """A session with somebody on the way, who changes what has come so far for either end by the functions given.

    Both ends say ``SAID``. Returns what each received, whether it was closed, and the bytes that came for it unchanged.
    """
    with contextlib.ExitStack() as stack:
        (near_a, far_a), (far_b, near_b) = tcp(), tcp()
        for sock in (far_a, far_b):
            stack.enter_context(sock)
        a = stack.enter_context(contextlib.closing(Wire(near_a, EXPECTS, TOKEN, opens=True, within_s=FAR_S)))
        b = stack.enter_context(contextlib.closing(Wire(near_b, EXPECTS, TOKEN, opens=False, within_s=FAR_S)))
        for message in SAID:
            a.send(message)
            b.send(message)
        ways = ((far_b, far_a, a, to_opener), (far_a, far_b, b, to_listener))
        heard, streams, given, moved = {a: [], b: []}, {a: b"", b: b""}, {a: 0, b: 0}, True
        while moved:  # loopback delivers at once: when nothing moved, nothing will
            moved = False
            heard[a] += a.receive()
            heard[b] += b.receive()
            for source, sink, end, way in ways:
                with contextlib.suppress(BlockingIOError):
                    streams[end] += source.recv(1 << 16)
                stream = way(streams[end])[given[end] :]
                if stream:
                    sink.send(stream)
                    given[end], moved = given[end] + len(stream), True
        return [(heard[end], end.closed, streams[end], end) for end in (a, b)]


def test_a_session_that_nobody_touches():
    for (heard, closed, stream, _), handshake in zip(session(), (1, 2), strict=True):
        assert heard == SAID and not closed and stream.count(b"\n") == handshake + len(SAID)


@pytest.mark.parametrize("listens", [False, True])
@given(data=st.data())
def test_what_is_changed_on_the_way_ends_the_connection(listens, data):
    """A bit flipped, a line left out, repeated or moved, bytes put in or taken: only what came before is heard."""
    handshake = 2 if listens else 1
    last = handshake + len(SAID) - 1
    kind = data.draw(st.sampled_from(["flip", "drop", "repeat", "swap", "put in", "cut"]))
    first = data.draw(st.integers(handshake, last - 1) if kind == "swap" else st.integers(0, last))
    place, bit = data.draw(st.floats(0, 1, exclude_max=True)), data.draw(st.integers(0, 7))
    noise = data.draw(st.binary(min_size=1, max_size=60))

    def change(stream):
        lines = stream.splitlines(keepends=True)
        if len(lines) <= first + (kind == "swap") or not lines[-1].endswith(b"\n"):
            return b"".join(lines[:first])
        line = lines[first]
        at = int(place * len(line))
        changed = {
            "flip": [line[:at] + bytes([line[at] ^ 1 << bit]) + line[at + 1 :]],
            "drop": [],
            "repeat": [line, line],
            "swap": [lines[-1], line],
            "put in": [line[:at] + noise + line[at:]],
            "cut": [line[:at]],
        }
        after = lines[first + 1 + (kind == "swap") :]
        return b"".join([*lines[:first], *changed[kind], *after])

    heard, closed, _, end = session(**{"to_listener" if listens else "to_opener": change})[listens]
    before = max(0, first - handshake)
    whole = first >= handshake and (kind == "repeat" or (kind == "put in" and b"\n" in noise and len(heard) > before))
    assert heard == SAID[: before + whole]
    assert closed or not end.authenticated or first == last
    assert (end.complaint is not None) == closed


@pytest.mark.parametrize("opens", [True, False])
@given(pieces=st.lists(st.binary(min_size=1, max_size=300), max_size=6), hello=st.booleans())
def test_noise_is_refused_and_harmless(opens, pieces, hello):
    ours, theirs = tcp() if opens else reversed(tcp())
    with contextlib.closing(Wire(ours, EXPECTS, TOKEN, opens=opens)) as one, theirs:
        for piece in [one._hello + b" "] * hello + pieces:
            with contextlib.suppress(OSError):
                theirs.send(piece)
            assert one.receive() == [] and not one.authenticated and len(one._received) <= wire.HANDSHAKE_BYTES
        theirs.shutdown(socket.SHUT_WR)
        (text,) = until_closed(one)
        assert text.startswith((one.peer, os.uname().nodename))


@pytest.mark.parametrize("listens", [False, True])
def test_a_session_played_again_is_refused(opened, listens):
    """To an end that has the same token, whole and in pieces."""
    stream = session()[listens][2]
    for size in (len(stream), 1):
        ours, theirs = reversed(tcp()) if listens else tcp()
        one = opened(Wire(ours, EXPECTS, TOKEN, opens=not listens))
        opened(theirs)
        for at in range(0, len(stream), size):
            with contextlib.suppress(OSError):
                theirs.send(stream[at : at + size])
            assert one.receive() == []
        assert "has another job's token" in until_closed(one)[0]


def test_lines_of_an_earlier_session_are_refused():
    earlier = session()

    def instead(number, handshake):
        then = earlier[number][2].splitlines(keepends=True)[handshake:]

        def way(stream):
            lines = stream.splitlines(keepends=True)
            return b"".join(lines[:handshake] + then[: max(0, len(lines) - handshake)])

        return way

    for heard, closed, _, end in session(instead(0, 1), instead(1, 2)):
        assert heard == [] and closed and "line 1 from" in str(end.complaint)


def test_the_proof_of_one_end_is_none_of_the_other(opened):
    """Somebody without the token gives back what the listening end says."""
    far, b = tcp()
    b = opened(Wire(b, EXPECTS, TOKEN, opens=False))
    opened(far).send(Wire(opened(socket.socket()), EXPECTS, OTHER, opens=True)._hello + b"\n")
    b.receive()
    proof = sent_by(far).split()[-1]
    assert len(proof) == 64
    far.send(proof + b"\n")
    assert "has another job's token" in until_closed(b)[0]


def test_the_other_direction_of_a_session_is_refused(opened):
    """What one end says, sent back to it: in the handshake, and with the right number after it."""
    a, far = tcp()
    a = opened(Wire(a, EXPECTS, TOKEN, opens=True))
    a.receive()
    opened(far).send(sent_by(far))
    assert "is no agent" in until_closed(a)[0]

    mine = []

    def keep(stream):
        mine[:] = stream.splitlines(keepends=True)[2:]
        return stream

    def mirror(stream):
        hello, *theirs = stream.splitlines(keepends=True) or [b""]
        return b"".join([hello, *mine]) if theirs else hello

    (heard, closed, _, end), _ = session(to_opener=mirror, to_listener=keep)
    assert heard == [] and closed and "line 1 from" in str(end.complaint), (end.complaint, mine)


# --- listening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken(opened, address):
    taken = opened(wire.listen(address, 0)).getsockname()[1]
    with pytest.raises(
        ClusterError, match=rf"port {taken} of {address} is taken.*ss -ltnp 'sport = :{taken}'"
    ) as caught:
        wire.listen(address, taken)
    assert "--master_port N" in str(caught.value) and "MASTER_PORT=N" in str(caught.value)


@pytest.mark.parametrize("address", ["203.0.113.1", "h1.invalid"])
def test_an_address_of_another_machine(address):
    with pytest.raises(ClusterError, match=rf"cannot listen on {address}:0 on .*Expected an address of this machine"):
        wire.listen(address, 0)


def test_a_port_can_be_used_again_at_once(opened):
    """A connection of the last agent lingers in the kernel (TIME_WAIT) after both ends have closed."""
    listener = wire.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    a = wire.connect("127.0.0.1", port, EXPECTS, TOKEN)
    select.select([listener], [], [], FAR_S)
    b = wire.accept(listener, EXPECTS, TOKEN)
    shake(a, b)
    b.close()
    until_closed(a)
    a.close()
    listener.close()
    opened(wire.listen("127.0.0.1", port))


def test_accept_without_descriptors(opened, monkeypatch):
    """It says so and keeps nothing; the next one comes."""
    listener = opened(wire.listen("127.0.0.1", 0))
    unlucky = opened(wire.connect(*listener.getsockname(), EXPECTS, TOKEN))
    select.select([listener], [], [], FAR_S)

    def none_left(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    for owner, name in ((socket.socket, "accept"), (select, "epoll")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many") as caught:
            patch.setattr(owner, name, none_left)
            wire.accept(listener, EXPECTS, TOKEN)
    assert "end of stream" in until_closed(unlucky)[0] and caught.value  # whose traceback still holds the socket
    a = opened(wire.connect(*listener.getsockname(), EXPECTS, TOKEN))
    select.select([listener], [], [], FAR_S)
    shake(a, opened(wire.accept(listener, EXPECTS, TOKEN)))
