"""The connection between two agents of a job, over TCP: a channel whose peer has proved that it is of the same job.

Why this and not gRPC. An agent is one loop over sockets. gRPC would bring a second loop with threads, and we would still
have to write the proof that a peer is of this job. A ``Wire`` is a :class:`messages.Channel`: same messages, same loop.

Ownership. Both agents hold the job's token, a secret that never travels. A ``Wire`` owns its socket, and an epoll object
whose number it shows to selectors: that becomes readable when the socket is, or has room for what waits to be sent. So a
loop that only looks for readable descriptors also finishes connects, handshakes and long messages. No call waits, but
``send`` with a ``timeout_s``, and ``connect`` and ``listen`` for the resolver if they get a name instead of an address.
A thread that has nothing else to do calls ``receive_one``, ``send_bytes`` and ``receive_bytes`` instead of ``receive``:
they wait, and raise where the loop would look at ``closed``. Raw bytes follow a line; no MAC covers them.

Handshake. Three lines, the same in every version of this code, so that two versions can say what is wrong:

    opens:    gemini_gnn <protocol> <version> <nonce>
    listens:  gemini_gnn <protocol> <version> <nonce> <proof>
    opens:    <proof>

A proof is an HMAC-SHA256 with the token over the prover's side and both sides' protocol, version and nonce. So it fits
this connection and this direction only. The key of the session comes from the same. After the handshake each line begins
with 16 bytes of HMAC over sender's side, number of the line, and line: one that was changed, repeated, left out, moved
or put in ends the connection. Nothing is encrypted: others on the network can read the messages.

Interruptions. Each end may die, or the network be cut, at any byte. The kernel closes a connection whose peer leaves data
unacknowledged for ``UNANSWERED_S``, or is silent for longer while nothing is sent. A peer that is connected and has not
proved itself within ``within_s`` is closed, and can make us keep at most ``HANDSHAKE_BYTES``. A peer that proved itself
and does not read can make us keep ``messages.MAX_MESSAGE_BYTES``.

Losses. Messages arrive in order and once, up to some message; all after it are lost with the connection. That ``send``
returned True says that a message waits, not that it arrived. An end that must be heard waits for an answer before it
closes: ``close`` drops what waits here, and may drop what waits in the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hmac
import math
import os
import re
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from gemini_gnn.errors import ClusterError
from gemini_gnn.recovery import messages

HANDSHAKE_BYTES = 4096  # that a peer without proof can make us keep
UNANSWERED_S = 10  # then the kernel gives a connection up; heartbeats notice sooner
MAC_BYTES = 16
_READ_AHEAD = 1 << 16
_WAKE_BYTES = 512 << 10  # of raw bytes, that a receiver waits for before it reads

STALLS = 4.0  # times as long may a peer say nothing whose kernel acknowledges all: its machine lives, and is busy
_UNACKED = 24  # of struct tcp_info (linux/tcp.h): uint32, packets on their way

FIRST_WORD = b"gemini_gnn "
HELLO = re.compile(
    b"(?P<hello>" + FIRST_WORD + rb"(?P<protocol>\d{1,9}) (?P<version>[0-9A-Za-z.+!_-]{1,64}) [0-9a-f]{64})"
    rb"(?: (?P<proof>[0-9a-f]{64}))?"
)
OWN_PORT = "deepspeed --master_port N ..., or MASTER_PORT=N srun ..."


def is_silent(channel: messages.Channel, quiet_s: float, silence_s: float) -> bool:
    """Whether a peer that has said nothing for ``quiet_s`` counts as silent.

    A machine without power or network acknowledges nothing. A process that is starved or stopped for a moment says nothing
    either, but the kernel of its machine goes on acknowledging heartbeats. Call it at every look, also when all is well.
    """
    unanswered_s = channel.unacknowledged_s()  # counts from the first look that finds something
    if quiet_s <= silence_s:
        return False
    return quiet_s > STALLS * silence_s or unanswered_s > silence_s / 2


class Stranger(ValueError):
    """What answers is not of this job, or does not prove it; the text is for people."""


class OtherVersion(Stranger):
    """The peer holds the token and is of another version of gemini_gnn; the text is for people."""


@functools.cache
def version() -> str:
    try:
        return metadata.version("gemini-gnn")
    except metadata.PackageNotFoundError:  # on the import path, not installed
        return "unknown"


class Wire(messages.Channel):
    """One end of a connection between two agents. ``complaint`` says, in words for people, why it was closed.

    ``receive`` returns nothing before both ends have proved themselves; it also looks at the deadline for that, so call it
    now and then. What is sent before waits here.

    Attributes:
        authenticated: both ends have proved that they hold the token.
        peer: "10.0.0.3:4711", for people.
    """

    def __init__(
        self, sock: socket.socket, expects: Sequence[type], token: bytes, *, opens: bool, within_s: float = 10.0
    ):
        assert len(token) >= 16, "a token that can be guessed proves nothing"
        super().__init__(sock, expects)
        self.authenticated = False
        self.peer = "?"
        with contextlib.suppress(OSError):  # not connected yet, or no longer
            self.peer = _name(sock.getpeername())
        self._token, self._opens, self._within_s = token, opens, within_s
        self._deadline = time.monotonic() + within_s
        self._hello = FIRST_WORD + f"{messages.PROTOCOL} {version()} {secrets.token_hex(32)}".encode()
        self._both: bytes | None = None  # both ends' hellos; None until the peer's has come
        self._peer_version = (0, "")
        self._key = b""
        self._sent = self._taken = 0  # lines since the handshake
        self._unanswered_s = math.inf  # when a look first found something unacknowledged
        self._early: list[bytes] = []  # messages that were sent before the end of the handshake
        self._early_bytes = 0
        self._unsent = bytearray(self._hello + b"\n" if opens else b"")  # the first receive() sends it
        self._epoll = select.epoll()
        self._epoll.register(sock, self._interest())

    def fileno(self) -> int:
        return -1 if self._epoll.closed else self._epoll.fileno()

    def unacknowledged_s(self) -> float:
        """Seconds since a look first found something that the peer's kernel has not acknowledged; 0: it has all.

        Time in which this process does not run, and so sends nothing, counts for nothing: the kernels go on meanwhile.
        """
        try:
            about = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED + 4)
        except OSError:
            return math.inf
        now, waiting = time.monotonic(), struct.unpack_from("=I", about, _UNACKED)[0] > 0
        self._unanswered_s = min(self._unanswered_s, now) if waiting else math.inf
        return max(0.0, now - self._unanswered_s)

    @property
    def is_connected(self) -> bool:
        """Whether the peer's kernel has answered: it took the first line."""
        return self.authenticated or not (self._opens and self._unsent)

    def close(self) -> None:
        self._epoll.close()
        super().close()

    def send(self, message: messages.Message, timeout_s: float = 0.0) -> bool:
        """Whether the message is on its way. Waits at most ``timeout_s`` for the kernel to take it, if authenticated."""
        assert not getattr(message, "descriptors", None), "descriptors cannot leave the machine"
        if self.closed:
            return False
        line = messages.encode(message)[:-1]
        if len(self._unsent) + self._early_bytes + len(line) > messages.MAX_MESSAGE_BYTES:
            self._refuse(f"{self.peer} does not read: {messages.MAX_MESSAGE_BYTES} bytes would wait for it")
            return False
        if not self.authenticated:
            self._early.append(line)
            self._early_bytes += len(line)
            return True
        deadline = time.monotonic() + timeout_s
        alive = self._write(self._sealed(line))
        while alive and self._unsent and (left_s := deadline - time.monotonic()) > 0:
            select.select([], [self.sock], [], left_s)
            alive = self._write()
        return alive

    def receive(self) -> list[messages.Message]:
        self._shake()
        return super().receive() if self.authenticated else []

    # --- for a thread that may wait -----------------------------------------------------------------------------------

    def receive_one(self, timeout_s: float) -> messages.Message:
        """The next message. What follows it stays for the next call: a message or raw bytes.

        Raises:
            TimeoutError: it has not come within ``timeout_s``; the connection is as before.
            OSError: the connection has ended. ValueError: what came was refused; the text is for people.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._shake()
            if self.authenticated and b"\n" in self._received:
                line, _, rest = self._received.partition(b"\n")
                self._received = rest
                try:
                    return messages.decode(self._opened(bytes(line)), self.expects, [])
                except ValueError as error:
                    self._refuse(error)
            if self.complaint is not None:
                raise self.complaint
            if self.closed:
                raise self._ended()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise self._silent(timeout_s)
            if not self.authenticated:
                select.select([self], [], [], min(left_s, max(0.0, self._deadline - time.monotonic())))
            elif len(self._received) > messages.MAX_MESSAGE_BYTES:
                self._refuse(f"a message of more than {messages.MAX_MESSAGE_BYTES} bytes from {self.peer}")
            else:
                self._received += self._read(bytearray(_READ_AHEAD), left_s)

    def receive_bytes(self, into: memoryview, stall_s: float) -> None:
        """Fill ``into`` with the raw bytes that follow a message.

        Raises:
            TimeoutError: nothing came for ``stall_s``. OSError: the connection has ended.
        """
        ahead = min(len(self._received), len(into))
        into[:ahead] = self._received[:ahead]
        del self._received[:ahead]
        enough = 1
        try:
            while into := into[ahead:]:
                if enough != (enough := min(len(into), _WAKE_BYTES)):  # a quarter less CPU time than for each packet
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, enough)
                ahead = len(self._read(into, stall_s))
        finally:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def send_bytes(self, data: memoryview, stall_s: float) -> None:
        """Send raw bytes after all messages; return when the kernel has taken them.

        Raises:
            TimeoutError: the peer took nothing for ``stall_s``. OSError: the connection has ended.
        """
        assert self.authenticated
        waited, self._unsent = memoryview(self._unsent), bytearray()
        if waited:
            self._epoll.modify(self.sock, self._interest())
        for view in (waited, data):
            while view:
                try:
                    view = view[self.sock.send(view, socket.MSG_NOSIGNAL) :]
                except (BlockingIOError, InterruptedError):
                    if not select.select([], [self.sock], [], stall_s)[1]:
                        raise self._silent(stall_s) from None

    def _read(self, into: bytearray | memoryview, timeout_s: float) -> bytearray | memoryview:
        """What has come, at the beginning of ``into``; waits for something."""
        late = False
        while True:
            try:
                count = self.sock.recv_into(into)
            except (BlockingIOError, InterruptedError):
                if late:
                    raise self._silent(timeout_s) from None
                late = not select.select([self.sock], [], [], timeout_s)[0]  # then less than enough may be there
                continue
            if not count:
                self.closed = True
                raise self._ended()
            return into[:count]

    def _ended(self) -> ConnectionError:
        return ConnectionError(f"{self.peer} has closed the connection")

    def _silent(self, seconds: float) -> TimeoutError:
        return TimeoutError(f"{self.peer} has not moved a byte for {seconds:g} s")

    # --- handshake ----------------------------------------------------------------------------------------------------

    def _shake(self) -> None:
        """What can be done now of the handshake, and of what waits to be sent."""
        if not self.closed:
            self._write()
        while not self.closed and not self.authenticated and (line := self._handshake_line()) is not None:
            self._take(line)
        if not self.closed and not self.authenticated and time.monotonic() >= self._deadline:
            self._refuse_late()

    def _handshake_line(self) -> bytes | None:
        """The next line; None if it has not come, or never will."""
        while b"\n" not in self._received:
            try:
                data = self.sock.recv(HANDSHAKE_BYTES - len(self._received))
            except (BlockingIOError, InterruptedError):
                return None
            except OSError as error:
                self._refuse_lost(error)
                return None
            if not data:
                self._refuse_lost("end of stream")
                return None
            self._received += data
            is_hello = self._received.startswith(FIRST_WORD[: len(self._received)])
            if (self._both is None and not is_hello) or len(self._received) == HANDSHAKE_BYTES:
                break
        line, end, rest = self._received.partition(b"\n")
        self._received = rest
        if not end:
            self._refuse_stranger()
            return None
        return bytes(line)

    def _take(self, line: bytes) -> None:
        """The peer's hello, or the proof of the one that opened the connection."""
        if self._both is not None:
            self._take_proof(line)
            return
        found = HELLO.fullmatch(line)
        if found is None or (found["proof"] is not None) != self._opens:
            self._refuse_stranger()
            return
        self._peer_version = int(found["protocol"]), found["version"].decode()
        ours, theirs = self._hello, found["hello"]
        self._both = b"\n".join([ours, theirs] if self._opens else [theirs, ours])
        if self._opens:
            self._take_proof(found["proof"])
        else:
            self._write(ours + b" " + self._proof(of_opener=False) + b"\n")

    def _take_proof(self, proof: bytes) -> None:
        """The end of the handshake."""
        holds = hmac.compare_digest(proof, self._proof(not self._opens))
        if self._opens:  # whatever is wrong: the peer shall say so, too
            self._write(self._proof(of_opener=True) + b"\n")
        if not holds:
            words = (
                f"{self.peer} has another job's token. Two jobs meet at one port: give this one its own: {OWN_PORT}. Or run_dir "
                "is not one folder that all machines share: `python launch/doctor.py run_dir=...` tells"
            )
            self._refuse(Stranger(words))
        elif self._peer_version != (messages.PROTOCOL, version()):
            protocol, theirs = self._peer_version
            words = (
                f"{self.peer} runs gemini_gnn {theirs} (protocol {protocol}), {os.uname().nodename} runs {version()} "
                f"(protocol {messages.PROTOCOL}): use the same installation on all machines"
            )
            self._refuse(OtherVersion(words))
        elif not self.closed:  # the peer may have gone meanwhile
            assert self._both is not None
            self._key = hmac.digest(self._token, b"session\n" + self._both, "sha256")
            self.authenticated = True
            self._write(b"".join(map(self._sealed, self._early)))
            self._early, self._early_bytes = [], 0

    def _proof(self, of_opener: bool) -> bytes:
        assert self._both is not None
        return hmac.digest(self._token, _side(of_opener) + self._both, "sha256").hex().encode()

    def _refuse_stranger(self) -> None:
        words = f"{self.peer} is no agent of gemini_gnn. If it has this port, give the job another: {OWN_PORT}"
        self._refuse(Stranger(words))

    def _refuse_late(self) -> None:
        if self._opens and self._unsent:  # the kernel takes the hello as soon as there is a connection
            self._refuse_lost(f"no answer for {self._within_s:g} s")
        else:
            self._refuse(Stranger(f"{self.peer} did not prove within {self._within_s:g} s that it is of this job"))

    def _refuse_lost(self, reason: str | OSError) -> None:
        if isinstance(reason, OSError):
            reason = str(reason.strerror)
        if self._opens:
            machine, (address, _, port) = os.uname().nodename, self.peer.rpartition(":")
            self._refuse(
                f"{machine} cannot reach an agent at {self.peer}: {reason}. Does an agent run there, is a firewall between "
                f"the two? Try on {machine}: timeout 5 bash -c '</dev/tcp/{address.strip('[]')}/{port}' && echo open"
            )
        else:
            self._refuse(f"{self.peer} was gone before it had proved that it is of this job: {reason}")

    def _refuse(self, why: str | ValueError) -> None:
        self.complaint = ValueError(why) if isinstance(why, str) else why
        self.closed = True

    # --- lines after the handshake ------------------------------------------------------------------------------------

    def _mac(self, of_opener: bool, number: int, line: bytes) -> bytes:
        message = _side(of_opener) + number.to_bytes(8, "big") + line
        return hmac.digest(self._key, message, "sha256")[:MAC_BYTES].hex().encode()

    def _sealed(self, line: bytes) -> bytes:
        self._sent += 1
        return self._mac(self._opens, self._sent, line) + b" " + line + b"\n"

    def _opened(self, line: bytes) -> bytes:
        self._taken += 1
        mac, _, inner = line.partition(b" ")
        if not hmac.compare_digest(mac, self._mac(not self._opens, self._taken, inner)):
            raise ValueError(f"line {self._taken} from {self.peer} was changed, repeated, moved or put in on the way")
        return inner

    def _write(self, data: bytes = b"") -> bool:
        """Send ``data`` after what waits, as far as the kernel takes it. False: the peer is gone."""
        alive, waited = True, bool(self._unsent)
        self._unsent += data
        try:
            while self._unsent:
                del self._unsent[: self.sock.send(self._unsent, socket.MSG_NOSIGNAL)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            alive = False
            if not self.authenticated:
                self._refuse_lost(error)
        if waited != bool(self._unsent):
            self._epoll.modify(self.sock, self._interest())
        return alive

    def _interest(self) -> int:
        return select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0)


def _side(of_opener: bool) -> bytes:
    return b"opens\n" if of_opener else b"listens\n"


def _name(address: Any) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, UNANSWERED_S // 2))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, UNANSWERED_S // 4))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_S * 1000)


def _resolve(address: str, port: int) -> tuple:
    """The first entry: the one that a client tries first."""
    try:
        return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError:  # not even the form of a name
        raise socket.gaierror(socket.EAI_NONAME, "no name of a machine") from None


def connect(address: str, port: int, expects: Sequence[type], token: bytes) -> Wire:
    """A connection that is being made. It is closed, with a complaint, if there is nobody or no way.

    Raises:
        OSError: this process is out of descriptors or memory.
    """
    problem: OSError | None = None
    try:
        family, _, _, _, where = _resolve(address, port)
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        problem, sock = error, socket.socket()  # to be closed like any other
    _tune(sock)
    if problem is None and (code := sock.connect_ex(where)) not in (0, errno.EINPROGRESS):
        problem = OSError(code, os.strerror(code))
    wire = Wire(sock, expects, token, opens=True)
    wire.peer = _name((address, port))
    if problem is not None:
        wire._refuse_lost(problem)
    return wire


def listen(address: str, port: int) -> socket.socket:
    """A listening socket at ``address``, IPv4 or IPv6; port 0: any free one.

    Raises:
        ClusterError: another program has the port, or the address is not of this machine.
    """
    machine = os.uname().nodename
    sock = None
    try:
        family, _, _, _, where = _resolve(address, port)
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(1024)
        sock.setblocking(False)
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ClusterError(
                f"port {port} of {address} is taken on {machine}, probably by another job. `ss -ltnp 'sport = :{port}'` there "
                f"names the process. Give this job its own port: {OWN_PORT}"
            ) from None
        raise ClusterError(
            f"cannot listen on {_name((address, port))} on {machine}: {error.strerror}. Expected an address of this machine "
            "that the others reach, and a port from 1024 on: MASTER_ADDR and MASTER_PORT (deepspeed --master_addr A "
            "--master_port N ...)"
        ) from error
    return sock


def accept(listener: socket.socket, expects: Sequence[type], token: bytes) -> Wire | None:
    """The next connection, or None.

    Raises:
        OSError: this process is out of descriptors or memory. The connection waits, or its peer connects again.
    """
    try:
        sock, _ = listener.accept()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            raise
        return None  # nobody, or gone again
    try:
        _tune(sock)
        return Wire(sock, expects, token, opens=False)
    except OSError:
        sock.close()
        raise
