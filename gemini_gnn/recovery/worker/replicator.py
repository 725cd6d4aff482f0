"""The replicator: a process under the worker agent that copies snapshots between machines. No torch.

It pushes the committed shards of this machine's ranks to the peers that keep copies, keeps the peers' shards, serves the
ones that others fetch, and fetches. It is a process of its own: if it stalls, is killed or runs out of memory, the agent
starts another one, and no trainer notices. ``transfer.py`` says what travels on a connection.

Who owns what. The main thread owns the agent's channel, the listening socket, the bell, and the decision what is pushed
next; it alone says Copied, Fetched, Silent and Alive. Beside it, each peer has a *courier*, a thread that connects and
pushes; each incoming connection and each source of a fetch has a thread. All of them belong to a :class:`Shift`, which ends
with Quiet. They tell the main thread by a queue of the shift, and learn from it by values that it replaces as a whole
(``_order``). The slot files of a thread are its own (``transfer.Slots``).

What may be interrupted where. This process may be killed at any instruction: the kernel drops its locks, and slots that
it wrote are WRITING. The agent gives the next one the last orders. Quiet ends a shift: connections are shut down, which
wakes every thread that waits in one, and the threads are joined; then nothing here writes into the arena, and Silent is
said. A thread that does not end in time ends the process without Silent: the kernel stops its writes.

What may be lost. A ring of the bell: the main thread also looks when it beats. Every message between replicators: see
``transfer.py``. An error in a courier ends an attempt, never the courier: it says so once and tries again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import selectors
import signal
import socket
import stat
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gemini_gnn.errors import GeminiError
from gemini_gnn.recovery import board, messages, processes, transfer, wire
from gemini_gnn.recovery.messages import Peer, Trouble
from gemini_gnn.recovery.worker.pace import Pace
from gemini_gnn.snapshot.store import catalog, locks
from gemini_gnn.snapshot.store.identity import Identity

BEAT_S = 1.0  # from one Alive to the next
AGAIN_S = 0.05  # then a shard is offered again that was to be offered later
RETRY_S = (0.1, 1.0)  # from an attempt that failed to the next: the first, and the most
GRACE_S = 1.0  # of failures before people hear of it: a peer's replicator may just be starting again
LATER_S = 10.0  # of Later before people hear of it
REACH_S = 3.0  # to reach the source of a fetch
END_S = 10.0  # for the threads of a shift to end
MOST_CONNECTIONS = 256
REFUSED_S = 10.0  # from one line on refused connections to the next: a scan of ports shall not fill a log


class Shift:
    """The threads and connections between two Quiets. The main thread calls all but :meth:`holding` and :meth:`tell`."""

    def __init__(self, wake: Callable[[], None]):
        self.stop = threading.Event()
        self.news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wake, self._lock = wake, threading.Lock()
        self._wires: set[wire.Wire] = set()  # guarded by _lock
        self._threads: list[threading.Thread] = []

    def start(self, name: str, work: Callable[[], None]) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    @property
    def threads(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.tell(Trouble(f"{os.uname().nodename}: {threading.current_thread().name} of the replicator: {error!r}"))

    def tell(self, news: Any) -> None:
        self.news.put(news)
        self._wake()

    @contextlib.contextmanager
    def holding(self, one: wire.Wire) -> Iterator[wire.Wire]:
        """Close the connection with the block, and break it off when the shift ends.

        Raises:
            ConnectionError: the shift has ended.
        """
        with self._lock:
            self._wires.add(one)
        try:
            if self.stop.is_set():
                raise ConnectionError("broken off")
            yield one
        finally:
            with self._lock:
                self._wires.remove(one)
                one.close()

    def end(self) -> bool:
        """Break all off. Whether every thread has ended."""
        self.stop.set()
        with self._lock:
            for one in self._wires:
                with contextlib.suppress(OSError):  # not connected, or no longer
                    one.sock.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.threads == 0


class Courier:
    """The thread that brings this machine's shards to one peer: :meth:`run`. ``bring`` says what."""

    def __init__(self, peer: Peer, replicate: messages.Replicate, here: Replicator):
        self.peer, self._replicate, self._here, self._shift = peer, replicate, here, here.shift
        self.bring: queue.SimpleQueue[Identity | None] = queue.SimpleQueue()
        self._pair = f"copies of snapshots from {os.uname().nodename} to {peer.name} ({peer.address}:{peer.port})"
        self._said = ""  # the trouble that people know of
        self._since_s: float | None = None  # of the trouble

    def run(self) -> None:
        slots, delay_s = transfer.Slots(self._here.arena), RETRY_S[0]
        try:
            identity, left = self.bring.get(), list(self._replicate.own)
            while identity is not None and not self._shift.stop.is_set():
                one: wire.Wire | None = None
                tried_s = time.monotonic()
                try:
                    with self._here.connected(self.peer) as one:
                        while identity is not None:
                            self._push(one, slots, left, identity)
                            delay_s = RETRY_S[0]
                            self._shift.tell((identity, self.peer))
                            identity, left = self.bring.get(), list(self._replicate.own)
                except (OSError, ValueError, GeminiError) as error:
                    unanswered = one is not None and not one.authenticated and time.monotonic() - tried_s > GRACE_S
                    self._trouble(str(error), 0.0 if unanswered or isinstance(error, TimeoutError) else GRACE_S)
                    self._shift.stop.wait(delay_s)
                    delay_s = min(2 * delay_s, RETRY_S[1])
                except Exception as error:  # not foreseen; it must not end the copies
                    traceback.print_exc()
                    self._trouble(repr(error), 0.0)
                    self._shift.stop.wait(RETRY_S[1])
        finally:
            slots.close()

    def _push(self, one: wire.Wire, slots: transfer.Slots, left: list[str], identity: Identity) -> None:
        """Push the shards that are ``left`` until each is kept."""
        while left:
            order = self._here.order
            assert order is not None  # of this shift
            answer = transfer.push(one, slots, left[0], identity, order, self._here.pace.gate())
            if isinstance(answer, messages.Kept):
                del left[0]
                self._works()
            elif isinstance(answer, messages.NotKept):
                raise ValueError(answer.text)
            else:
                if isinstance(answer, messages.Damaged):  # once: the slot is void now
                    self._shift.tell(answer)
                self._trouble(answer.text, LATER_S)
                if self._shift.stop.wait(AGAIN_S):
                    raise ConnectionError("broken off")

    def _trouble(self, text: str, patience_s: float) -> None:
        now = time.monotonic()
        self._since_s = now if self._since_s is None else self._since_s
        if not self._said and now - self._since_s >= patience_s and not self._shift.stop.is_set():
            self._said = text
            self._shift.tell(Trouble(f"{self._pair} do not work: {text}. They are tried again until they do"))

    def _works(self) -> None:
        if self._said:
            self._shift.tell(Trouble(f"{self._pair} work again"))
        self._said, self._since_s = "", None


class Replicator:
    """The main thread, and what the other threads read.

    Attributes:
        order: what this machine keeps, and which snapshot is recoverable; None while no generation runs.
        pace, shift: of now.
    """

    def __init__(
        self, arena: Path, job: str, channel: messages.Channel, listener: socket.socket, bell: int, token: bytes
    ):
        self.arena, self.job, self._channel, self._listener, self._token = arena, job, channel, listener, token
        self._bell = bell
        self._woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        for one in (channel, listener, self._bell, self._woken):
            self._selector.register(one, selectors.EVENT_READ)
        self._sent_bytes, self._beat_s = 0, 0.0
        self._refused_s = -REFUSED_S
        self._begin(None)

    # --- main thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the agent is gone."""
        while True:
            self._selector.select(max(0.0, self._until_s() - time.monotonic()))
            for number in (self._bell, self._woken):
                with contextlib.suppress(BlockingIOError):
                    os.read(number, 4096)
            for message in self._channel.receive():
                self._obey(message)
            if self._channel.closed:
                if self._channel.complaint is not None:
                    raise self._channel.complaint
                return
            self._accept()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._hear(self.shift.news.get_nowait())
            self._push_next()
            if time.monotonic() >= self._beat_s:
                self._beat_s = time.monotonic() + BEAT_S
                self._say(messages.Alive(self._sent_bytes + self.pace.sent_bytes))

    def _until_s(self) -> float:
        return min(self._beat_s, self._next_s) if self._waits else self._beat_s

    def _say(self, message: messages.Message) -> None:
        self._channel.send(message, timeout_s=5.0)  # if the agent is gone, receive() says so

    def _begin(self, replicate: messages.Replicate | None) -> None:
        """Begin a shift. The one before has ended."""
        self.shift = Shift(self._wake)
        self.pace = Pace(replicate.bytes_per_s if replicate else 0.0, self.shift.stop)
        self._replicate = replicate
        self.order: transfer.Order | None = None
        self._recoverable = replicate.recoverable if replicate else None
        self._pushing: Identity | None = None
        self._waits = False  # for the next round to be due
        self._next_s = 0.0
        self._lacking: set[Peer] = set()  # peers that do not have all of ``_pushing`` yet
        self._slots = transfer.Slots(self.arena)
        self._couriers: list[Courier] = []
        self._fetching: tuple[int, int] | None = None  # attempt, sources that have not ended
        self._misses: list[messages.Miss] = []
        if replicate is None:
            return
        kept = frozenset(replicate.kept)
        self.order = transfer.Order(replicate.term, replicate.generation, kept, replicate.recoverable)
        for peer in replicate.peers:
            courier = Courier(peer, replicate, self)
            self._couriers.append(courier)
            self.shift.start(f"the courier to {peer.name}", courier.run)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it wakes up anyway
            os.write(self._waker, b"\0")

    def _obey(self, message: messages.Message) -> None:
        match message:
            case messages.Replicate():
                self._end()
                self._begin(message)
            case messages.Advance(identity) if self.order is not None:
                self._recoverable = max(identity, self._recoverable or identity)
                known = max(self._recoverable, self.order.recoverable or identity)
                self.order = transfer.Order(self.order.term, self.order.generation, self.order.kept, known)
                if self._pushing is not None and identity >= self._pushing:
                    self._pushing = None
            case messages.Quiet():
                self._end()
                self._begin(None)
                self._say(messages.Silent())
            case messages.Fetch():
                if self.order is not None or self._fetching is not None:
                    self._end()
                    self._begin(None)
                self._fetch(message)

    def _end(self) -> None:
        """End the shift: from here on nothing writes into the arena."""
        for courier in self._couriers:
            courier.bring.put(None)
        if not self.shift.end():
            text = f"a thread did not end within {END_S:g} s"
            self._say(Trouble(f"{os.uname().nodename}: {text}: the replicator ends, and is started again"))
            os._exit(1)
        self._sent_bytes += self.pace.sent_bytes
        self._slots.close()

    def _hear(self, news: Any) -> None:
        match news:
            case (Identity() as identity, Peer() as peer) if identity == self._pushing:
                self._lacking.discard(peer)
                self._report()
            case list():
                assert self._fetching is not None
                self._misses += news
                attempt, left = self._fetching
                self._fetching = (attempt, left - 1)
                self._report_fetched()
            case Trouble() | messages.Damaged():
                self._say(news)

    # --- push ---------------------------------------------------------------------------------------------------------

    def _push_next(self) -> None:
        """Begin a round if one is due: the oldest snapshot that is not recoverable yet, once all ranks here have it."""
        self._waits = False
        if self._replicate is None or self._pushing is not None:
            return
        identity = next_push(self._committed(), self._recoverable, self._replicate.since)
        if identity is None:
            return
        now = time.monotonic()
        if now < self._next_s:
            self._waits = True
            return
        self._next_s = now + self._replicate.every_s
        self._pushing, self._lacking = identity, set(self._replicate.peers)
        if self._replicate.interleave and (mapped := board.open_board(self.arena)) is not None:
            self.pace.look = (mapped, self._replicate.pages)
        for courier in self._couriers:
            courier.bring.put(identity)
        self._report()

    def _committed(self) -> list[set[Identity]]:
        """Per shard of this machine's ranks, the snapshots in its slots."""
        assert self._replicate is not None
        found = []
        for shard in self._replicate.own:
            views = [file.view() for file in self._slots.there(shard)]
            found.append(catalog.committed(views).get(shard, set()))
        return found

    def _report(self) -> None:
        if self._pushing is not None and not self._lacking:
            assert self._replicate is not None
            self._say(messages.Copied(self._replicate.generation, self._pushing))

    # --- what comes ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while (one := wire.accept(self._listener, messages.TO_KEEPER, self._token)) is not None:
            if self.shift.threads >= MOST_CONNECTIONS:
                one.close()  # a peer tries again
                continue
            self.shift.start(f"the connection from {one.peer}", partial(self._answer, self.shift, one))

    def _answer(self, shift: Shift, one: wire.Wire) -> None:
        """Keep and serve what the peer says, until it goes."""
        slots = transfer.Slots(self.arena)
        try:
            with shift.holding(one):
                while True:
                    try:
                        message = one.receive_one(transfer.STALL_S)
                    except TimeoutError:
                        continue  # a peer that has nothing to push; the kernel notices one that is gone
                    if isinstance(message, messages.Offer):
                        transfer.keep(one, message, self.order, slots, self.job)
                    else:
                        assert isinstance(message, messages.Ask)
                        transfer.serve(one, message, slots, self.pace.gate())
        except OSError:
            return  # the peer notices too, and says so if it lasts
        except (ValueError, GeminiError) as error:
            now = time.monotonic()
            if (one.authenticated or isinstance(error, wire.Stranger)) and now - self._refused_s >= REFUSED_S:
                self._refused_s = now
                shift.tell(Trouble(f"{os.uname().nodename} has refused a connection for copies of snapshots: {error}"))
        finally:
            slots.close()

    @contextlib.contextmanager
    def connected(self, peer: Peer) -> Iterator[wire.Wire]:
        one = wire.connect(peer.address, peer.port, messages.FROM_KEEPER, self._token)
        with self.shift.holding(one):
            # Little waits in the kernel, so that a burst of the trainers' traffic does not wait behind it.
            one.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 2 * transfer.CHUNK_BYTES)
            yield one

    # --- fetch --------------------------------------------------------------------------------------------------------

    def _fetch(self, order: messages.Fetch) -> None:
        by_peer: dict[Peer, list[messages.Wanted]] = {}
        for one in order.wanted:
            by_peer.setdefault(one.peer, []).append(one)
        self._fetching, self._misses = (order.attempt, len(by_peer)), []
        for peer, wanted in by_peer.items():
            self.shift.start(f"the fetch from {peer.name}", partial(self._fetch_from, self.shift, peer, wanted))
        self._report_fetched()

    def _report_fetched(self) -> None:
        if self._fetching is not None and self._fetching[1] == 0:
            self._say(messages.Fetched(self._fetching[0], self._misses))
            self._fetching = None

    def _fetch_from(self, shift: Shift, peer: Peer, wanted: list[messages.Wanted]) -> None:
        """Fetch from one peer, and tell the misses. A peer that is gone has ``REACH_S`` to come back: it may be restarted."""
        slots, misses, left = transfer.Slots(self.arena), list[messages.Miss](), list(wanted)
        until_s, cut = time.monotonic() + REACH_S, 0
        try:
            while left and not shift.stop.is_set():
                reached = False
                try:
                    with self.connected(peer) as one:
                        while left:
                            miss = transfer.fetch(one, left[0], slots)
                            reached = True
                            misses += [miss] if miss is not None else []
                            del left[0]
                except (OSError, ValueError, GeminiError) as error:
                    cut += one.authenticated
                    if reached or cut == 1:  # it was there a moment ago
                        until_s = time.monotonic() + REACH_S
                    if time.monotonic() > until_s or isinstance(error, TimeoutError):
                        misses += [messages.Miss(w.shard, w.identity, peer.name, False, str(error)) for w in left]
                        break
                    shift.stop.wait(RETRY_S[0])
                except Exception as error:  # not foreseen; the root waits for an answer
                    traceback.print_exc()
                    misses += [messages.Miss(w.shard, w.identity, peer.name, False, repr(error)) for w in left]
                    break
            shift.tell(misses)
        finally:
            slots.close()


def next_push(committed: list[set[Identity]], recoverable: Identity | None, since: Identity | None) -> Identity | None:
    """The oldest snapshot that all shards of a machine have, newer than ``recoverable`` and not older than ``since``."""
    if not committed:
        return None
    whole = set.intersection(*committed)
    wanted = (one for one in whole if recoverable is None or one > recoverable)
    return min((one for one in wanted if since is None or one >= since), default=None)


def open_bell(arena: Path) -> int:
    """The FIFO that trainers write to; made if it is not there. It is open at both ends: it never says end of file."""
    path = arena / board.BELL
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    bell = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not stat.S_ISFIFO(os.fstat(bell).st_mode):
        raise FileExistsError(f"expected {path} to be a FIFO; it is another file: remove it")
    return bell


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The replicator of a job on this machine; started by its worker agent."
    )
    parser.add_argument("--arena", type=Path, required=True)
    parser.add_argument("--job", required=True, help="id of the job")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket to the agent")
    parser.add_argument(
        "--listen", type=int, required=True, help="descriptor of the socket that other machines connect to"
    )
    parser.add_argument("--token", type=int, required=True, help="descriptor of a file with the job's token")
    options = parser.parse_args()
    processes.die_with_parent(os.getppid())
    processes.name_this("gnn-replicator")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the agent decides
    locks.hold_trainers_lock(options.arena)  # until this process ends: it writes into the arena
    token = os.pread(options.token, 4096, 0)
    os.close(options.token)
    channel = messages.Channel(socket.socket(fileno=options.channel), messages.TO_REPLICATOR)
    listener = socket.socket(fileno=options.listen)
    listener.setblocking(False)
    try:
        Replicator(options.arena, options.job, channel, listener, open_bell(options.arena), token).run()
    except BaseException as error:
        traceback.print_exc()
        channel.send(Trouble(f"the replicator on {os.uname().nodename} ends: {error!r}"), timeout_s=1.0)
        os._exit(1)
    os._exit(0)  # without waiting for threads


if __name__ == "__main__":
    main()
