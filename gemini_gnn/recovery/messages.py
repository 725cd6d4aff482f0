"""The messages between slot process, worker agent, root, warm parent and trainer, and the sockets they travel on.

On the wire a message is one line of JSON: its class in snake case under ``kind``, then its fields. Messages to an agent
have ``protocol`` too, because their sender may be of another installation. Descriptors may ride along. A message that does
not fit its class closes the connection, and so does a class that the reader does not expect. ``Channel.complaint`` says
why. Other connections go on.

If a reader dies, messages that it has not read are lost. A process that waits for an answer also watches for the end of
the stream, so it sees a lost message as a lost peer. If a peer does not read (a shim on a stopped terminal), a sender
waits at most ``timeout_s``; then the peer counts as lost.
"""

from __future__ import annotations

import array
import json
import math
import os
import re
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec

from gemini_gnn.cluster.place import Place
from gemini_gnn.config import FaultsConfig, RecoveryConfig, SnapshotConfig
from gemini_gnn.faults.schedule import Fault
from gemini_gnn.recovery.board import Board
from gemini_gnn.recovery.outcome import Failure, Outcome
from gemini_gnn.snapshot.store.identity import Identity

MAX_MESSAGE_BYTES = 16 << 20
READ_BYTES = 1 << 20  # when so much has come, what is complete is handed out first
MAX_DESCRIPTORS = 253  # the kernel's limit for one message
PROTOCOL = 9  # of messages to an agent, which may be of an older installation: count up with every change


# --- slot process (or a visitor) -> agent --------------------------------------------------------------------


@dataclass(frozen=True)
class Register:
    """A slot process asks for a trainer of its rank, and waits for the outcome.

    Attributes:
        place: of the trainer in the job.
        target: "package.module:function" that the trainer calls.
        payload: JSON for the function.
        preload: modules that trainers are forked with.
        resume: "auto" | "never" | "must".
        recovery, snapshot, faults: the settings. start_timeout_s: from the first machine of the job to the last.
        deaths: number of this launch's agents that have died. died_s: when the last one did, on the machine's monotonic clock.
        environment, folder, path, command: of the slot process; the trainer gets the same.
        cores: of the slot process; the trainer runs on the same.
        launch: the same for all slot processes of one launch on one machine.
        pid: of the slot process. code: what it runs (``installation.code``).
        joins: it speaks for all slots of a machine that joins a living job; its `rank` stands for nothing.
    """

    place: Place
    target: str
    payload: dict[str, Any]
    preload: list[str]
    resume: str
    recovery: RecoveryConfig
    snapshot: SnapshotConfig
    faults: FaultsConfig
    start_timeout_s: float
    deaths: int
    died_s: float
    environment: dict[str, str]
    folder: str
    path: list[str]
    command: list[str]
    cores: list[int]
    launch: str
    pid: int
    code: str = ""
    joins: bool = False


@dataclass(frozen=True)
class Stop:
    """End the job in order.

    Attributes:
        reason: for people. code: exit code of the job.
        keep: leave the snapshots in host memory.
        force: do not wait for the trainers to finish their step.
    """

    reason: str
    code: int
    keep: bool = True
    force: bool = False


@dataclass(frozen=True)
class Inject:
    """Commit the fault of ``text`` (``faults.schedule.parse_command``) now. The answer is Committed."""

    text: str


@dataclass(frozen=True)
class Inspect:
    """Say which snapshots the machines of the job hold. The answer is Catalog."""


# --- agent -> slot process (or a visitor) --------------------------------------------------------------------


@dataclass(frozen=True)
class Accepted:
    """The agent will run the slot's trainer.

    Attributes:
        log: of the trainer; what this launch writes begins at ``offset``.
    """

    log: str
    offset: int


@dataclass(frozen=True)
class Follow:
    """Rank 0 runs on this machine now: show what it writes into ``log`` from now on."""

    log: str


@dataclass(frozen=True)
class Refused:
    """The agent will not run the slot's trainer; ``text`` says why, for people. ``code``: exit code for the slot."""

    code: int
    text: str


@dataclass(frozen=True)
class Catalog:
    """The snapshots in the memory of all machines and in storage, in words.

    Attributes:
        snapshots: a line each, the newest first: whether it can be restored, and from where each shard would come.
        recoverable: the newest one of which every shard has its copies.
        replicas: copies of each shard. silent: machines that have not answered.
    """

    snapshots: str
    recoverable: Identity | None
    replicas: int
    silent: list[str]


@dataclass(frozen=True)
class Ending:
    """The job of an earlier start is ending: the slot should ask again."""


@dataclass(frozen=True)
class Stepped:
    """A trainer of this agent has done a step: whatever fails next, it is not the same again and again."""


@dataclass(frozen=True)
class Say:
    """News of the job, for people."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The agent's last message: how the job ended on this machine.

    Attributes:
        outcome: "done" | "stopped" | "failed" | "lost". code: exit code. reason: one line.
        rank: of the trainer with the first error; -1: the agent's own error; None: no error. text: of that error.
        machine: of that trainer; empty if the job has only one.
        kept_files: number of snapshot files left in host memory. dropped_bytes: size of the removed ones.
        told: rank 0's machine says the same, on the same terminal.
        away: machines that do not know of the end. They keep their snapshots.
    """

    outcome: str
    code: int
    reason: str
    rank: int | None = None
    text: str = ""
    machine: str = ""
    kept_files: int = 0
    dropped_bytes: int = 0
    told: bool = False
    away: list[str] = field(default_factory=list)


# --- worker -> root ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Join:
    """A worker's first message on a connection: what it is, and what lives on its machine.

    Attributes:
        machine: its number in the launcher's order; -1: a new machine, or one that does not know it.
        name: its hostname. pid: of the worker agent. start: as in Welcome; empty: it has heard no root yet.
        world_size, local_world_size: of the launch, as its slot processes say.
        generation, reached: of the newest trainers that it knows of. None lives there now.
        ready: it can fork a generation. unable: why it never can; ``time_s`` as in :class:`RankFailed`.
        address, port: of its replicator; port 0: it has none. Address "": where the connection comes from.
        root_port: where it answers if it becomes root.
        disk: names its run directory, where each machine has one of its own; else empty. newest: the highest term that it knew
            there before this start, won or granted.
    """

    machine: int
    name: str
    pid: int
    world_size: int
    local_world_size: int
    ready: bool
    unable: Failure | None = None
    address: str = ""
    port: int = 0
    root_port: int = 0
    start: str = ""
    generation: int = 0
    reached: int = 0
    disk: str = ""
    newest: int = 0


@dataclass(frozen=True)
class Voted:
    """The answer to Vote: see ``root/ballot.py``.

    Attributes:
        claimer, number: as asked. newest: the highest number that this machine has granted, or knows to be won.
        won: the record of a newer term than `known`, if this machine knows one. votes: of lower numbers that it has granted.
    """

    claimer: str
    number: int
    granted: bool
    newest: int
    won: dict[str, Any]
    votes: list[dict[str, Any]]


@dataclass(frozen=True)
class Able:
    """Whether the machine can fork a generation now."""

    ready: bool


@dataclass(frozen=True)
class Unable:
    """The machine can never fork a generation."""

    failure: Failure


@dataclass(frozen=True)
class Stuck:
    """Trainers cannot be reaped; ``text`` says which."""

    text: str


@dataclass(frozen=True)
class RankListens:
    rank: int
    generation: int


@dataclass(frozen=True)
class RankFailed:
    """A trainer's error. ``failure.time_s``: how many seconds ago, for clocks of two machines are never compared."""

    failure: Failure
    generation: int


@dataclass(frozen=True)
class RankExited:
    rank: int
    generation: int
    code: int
    why: str


@dataclass(frozen=True)
class Beat:
    """A worker lives, and its trainers do this.

    Attributes:
        boards: by rank, with ages in seconds in place of times. stopped: ranks that a signal or a debugger has stopped.
        memory_bytes: of snapshots on the machine.
    """

    boards: dict[int, Board]
    stopped: list[int]
    memory_bytes: int


@dataclass(frozen=True)
class Holds:
    """The answer to Survey: shards that are committed in this machine's memory."""

    number: int
    shards: list[tuple[str, Identity]]


@dataclass(frozen=True)
class Bound:
    """The answer to Bind. ``port`` 0: it was not possible, and ``problem`` says why."""

    number: int
    port: int
    problem: str = ""


@dataclass(frozen=True)
class Stored:
    """The answer to AskCheckpoints: shards of complete checkpoints; ``problem``: why they cannot be listed."""

    number: int
    shards: list[tuple[str, Identity]]
    problem: str = ""


@dataclass(frozen=True)
class Committed:
    """The answer to Commit, and to Inject. ``text``: the harm that was done to which process, or why none (``done``)."""

    ask: int
    done: bool
    text: str


# --- replicators ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """The replicator of another machine."""

    name: str
    address: str
    port: int


# --- root -> worker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Welcome:
    """The root's answer to Join.

    Attributes:
        term: the newest that the root knows of. machine: the worker's number.
        start: names the start of the job: the same over all its roots.
        heartbeat_s, silence_s: of the job, as the root has them.
    """

    term: int
    heartbeat_s: float
    silence_s: float
    machine: int = 0
    start: str = ""


@dataclass(frozen=True)
class Member:
    """A machine of the job. ``address``, ``port``: where it answers if it becomes root; port 0: it never joined."""

    name: str
    address: str
    port: int


@dataclass(frozen=True)
class Roster:
    """All a worker must know to become root.

    Attributes:
        term: the newest that the root knows of. seats: of that term: by seat, the number of its machine.
        members: by number.
        record: of that term, where each machine has a run directory of its own, to be kept there; else empty.
    """

    term: int
    members: list[Member]
    seats: list[int]
    root: int
    generation: int
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Vote:
    """Grant ``number`` to the process of ``record``. ``known``: the newest term that it knows. The answer is Voted."""

    number: int
    known: int
    record: dict[str, Any]


@dataclass(frozen=True)
class News:
    """For a run directory of the worker's own: the status of the job, or what a failure cost."""

    status: dict[str, Any] = field(default_factory=dict)
    failure: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Moved:
    """The root has resigned: another one answers there, if it is known. Else look for one."""

    address: str = ""
    port: int = 0


@dataclass(frozen=True)
class Bind:
    """Bind the socket of the next generation's store. The answer is Bound."""

    number: int


@dataclass(frozen=True)
class RootBeat:
    """The root lives. ``ending``: a slot process that comes now should ask again."""

    ending: bool


@dataclass(frozen=True)
class Begin:
    """Fork generation ``generation``.

    Attributes:
        term: of the root. ranks: by slot. world_size: of the job.
        master_addr, master_port: of the process groups' store, which the machine of rank 0 has bound.
        resume: "auto" | "never" | "must".
        restore: the snapshot that it resumes from, as far as the root knows; all newer ones are void.
        recoverable: the newest snapshot that has all its copies already.
        replicas: copies of each shard. peers: that keep copies of this machine's. kept: ranks whose shards it keeps.
    """

    term: int
    generation: int
    world_size: int
    ranks: list[int]
    master_addr: str
    master_port: int
    resume: str
    restore: Identity | None = None
    recoverable: Identity | None = None
    replicas: int = 1
    peers: list[Peer] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Survey:
    """Say which shards lie in this machine's memory, once nothing writes there any more."""

    number: int


@dataclass(frozen=True)
class Look:
    """Say which shards lie in this machine's memory at this moment. The answer is Holds."""

    number: int


@dataclass(frozen=True)
class AskCheckpoints:
    """Say which checkpoints there are."""

    number: int


@dataclass(frozen=True)
class PersistAt:
    """Hold and persist the first snapshot of this step or a later one; 0: let go of it."""

    step: int


@dataclass(frozen=True)
class Close:
    """Kill and reap every trainer."""


@dataclass(frozen=True)
class AskToStop:
    """Ask every trainer to finish its step and end."""


@dataclass(frozen=True)
class DumpStacks:
    """Have every trainer write its stacks into its log."""


@dataclass(frozen=True)
class Finish:
    """The job has ended; its machines clean up. ``away``: those that do not hear of it."""

    outcome: Outcome
    away: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Commit:
    """Do the harm of ``fault`` to this machine, one of its processes, or (to a trainer) itself."""

    fault: Fault
    ask: int = 0


# --- agent <-> warm parent --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preload:
    """Import ``modules`` with ``path`` as ``sys.path``. The warm parent answers Ready or Unfit."""

    modules: list[str]
    path: list[str]


@dataclass(frozen=True)
class Fork:
    """Fork a trainer for each of ``descriptors``; the descriptor is the trainer's socket to the agent."""

    descriptors: list[int]


@dataclass(frozen=True)
class Ready:
    """The imports are done, after ``seconds``."""

    seconds: float


@dataclass(frozen=True)
class Unfit:
    """The warm parent cannot import or must not fork; ``text`` says why."""

    text: str


# --- agent <-> replicator ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replicate:
    """A generation begins: push the shards of ``own``, keep those of ``kept``.

    Attributes:
        since: older snapshots are not pushed than this one, from which the generation resumes, or which would be its first.
        recoverable: the newest snapshot that has all its copies already.
        own: shards of this machine's ranks, without the common one. kept: shards that peers push to this machine.
        peers: that keep copies of ``own``.
        pages: of the board, one per local rank.
        every_s: from the beginning of one snapshot's transfer to that of the next.
        bytes_per_s: limit of what is sent, at least 100,000: peers take less for a stall; 0: none.
        interleave: send between the bursts of the trainers' own traffic.
    """

    term: int
    generation: int
    since: Identity | None
    recoverable: Identity | None
    own: list[str]
    kept: list[str]
    peers: list[Peer]
    pages: int
    every_s: float = 0.05
    bytes_per_s: float = 0.0
    interleave: bool = True


@dataclass(frozen=True)
class Advance:
    """This snapshot is recoverable: every shard of it has its copies."""

    identity: Identity


@dataclass(frozen=True)
class Quiet:
    """The generation is over: write nothing more into the arena, break all transfers off; then answer Silent."""


@dataclass(frozen=True)
class Silent:
    """Nothing is written into the arena before the next Replicate or Fetch."""


@dataclass(frozen=True)
class Wanted:
    """A shard to be fetched. ``peer``: which has it in memory."""

    shard: str
    identity: Identity
    peer: Peer


@dataclass(frozen=True)
class Fetch:
    """Get these shards into this machine's arena. The answer is Fetched with the same ``attempt``."""

    attempt: int
    wanted: list[Wanted]


@dataclass(frozen=True)
class Miss:
    """A copy that could not be had. ``damaged``: it is there, and its bytes do not fit their checksum."""

    shard: str
    identity: Identity
    source: str
    damaged: bool
    text: str


@dataclass(frozen=True)
class Fetched:
    attempt: int
    misses: list[Miss]


@dataclass(frozen=True)
class Copied:
    """All own shards of this snapshot are on all peers, verified there."""

    generation: int
    identity: Identity


@dataclass(frozen=True)
class Damaged:
    """An own shard of this snapshot was damaged, and is void now; ``text`` says how. The root hears of it too."""

    shard: str
    identity: Identity
    text: str


@dataclass(frozen=True)
class Alive:
    """The replicator goes round, ``sent_bytes`` since its start; or the persister has loaded some more."""

    sent_bytes: int = 0


@dataclass(frozen=True)
class Trouble:
    """News for people: what does not work between which machines, and what to try."""

    text: str


# --- replicator <-> replicator ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """Keep this committed shard. The answer is Go, Kept, Later or NotKept.

    Attributes:
        term, generation: in which the sender pushes.
        header: of the sender's slot, as it lies there.
        recoverable: the newest snapshot that the sender knows to be recoverable.
    """

    term: int
    generation: int
    header: bytes
    recoverable: Identity | None


@dataclass(frozen=True)
class Go:
    """Send the bytes of the offered shard: from the first page after the header to the end of the tail."""


@dataclass(frozen=True)
class Kept:
    """The offered shard is committed here, and its bytes fit their checksums."""


@dataclass(frozen=True)
class Later:
    """The offered shard cannot be kept yet; ``text`` says why, if it lasts."""

    text: str


@dataclass(frozen=True)
class NotKept:
    """The offered shard is not kept; ``text`` says why, for people."""

    text: str


@dataclass(frozen=True)
class Ask:
    """Send this shard. The answer is Serve or Lacks."""

    shard: str
    identity: Identity


@dataclass(frozen=True)
class Serve:
    """``header`` of the slot that has the shard. Its bytes follow, as after Go."""

    header: bytes


@dataclass(frozen=True)
class Lacks:
    """The shard that was asked for is not committed here, or cannot be read; ``text`` says why."""

    text: str


# --- agent <-> persister ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Persist:
    """Write these shards of a snapshot from the arena to storage. The answer is Persisted."""

    identity: Identity
    shards: list[str]


@dataclass(frozen=True)
class Persisted:
    """The shards are durable, or ``problem`` says why not. ``identity``: None where the ranks hold different snapshots."""

    identity: Identity | None
    problem: str = ""


@dataclass(frozen=True)
class Complete:
    """All machines have persisted the snapshot: check that its shards are there, mark it complete, remove old ones.

    ``term``: of the root. If there is a newer one, nothing is marked.
    """

    identity: Identity
    shards: list[str]
    term: int = 0


@dataclass(frozen=True)
class Completed:
    identity: Identity
    problem: str = ""


@dataclass(frozen=True)
class ListCheckpoints:
    """The answer is Checkpoints."""


@dataclass(frozen=True)
class Checkpoints:
    """The complete checkpoints in storage, with their shards; ``problem``: why they cannot be listed."""

    identities: list[Identity]
    shards: list[list[str]]
    problem: str = ""


@dataclass(frozen=True)
class Load:
    """Read these shards of a checkpoint into the arena, verified. The answer is Fetched with the same ``attempt``."""

    attempt: int
    identity: Identity
    shards: list[str]


# --- agent <-> trainer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forked:
    """A trainer's first message. It is the agent's child, has done nothing yet, and waits for its Task."""

    pid: int


@dataclass(frozen=True)
class Task:
    """The work of a fresh trainer, sent once it has said Forked.

    Attributes:
        place, target, payload, environment, folder, path, command, cores: see :class:`Register`.
        log: file for its output.
        job: id of the job. arena: folder of the job's snapshots.
        term, generation: of the trainer's membership. resume: "auto" | "never" | "must".
        sharing: number of ranks that run on the same cores.
        replicas: copies of each shard in the job, the own one included.
        kept: ranks whose shards this machine keeps for other machines.
        descriptors: the listening socket of the store, if this trainer serves it.
    """

    place: Place
    target: str
    payload: dict[str, Any]
    environment: dict[str, str]
    folder: str
    path: list[str]
    command: list[str]
    cores: list[int]
    log: str
    job: str
    arena: str
    term: int
    generation: int
    resume: str
    sharing: int
    replicas: int = 1
    kept: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Started:
    """The trainer calls its target now, at ``time_s`` on this machine's monotonic clock."""

    time_s: float


@dataclass(frozen=True)
class Listens:
    """The trainer reads requests to stop from now on."""


@dataclass(frozen=True)
class StopAsked:
    """To a trainer: finish this step and end."""


@dataclass(frozen=True)
class Failed:
    """A trainer's last words: the fields of ``outcome.Failure`` without the rank."""

    code: int
    time_s: float
    summary: str
    text: str
    consequence: bool


Message = (
    Register | Stop | Inject | Accepted | Follow | Refused | Ending | Stepped | Say | Ended
    | Join | Able | Unable | Stuck | RankListens | RankFailed | RankExited | Beat | Holds | Bound | Stored | Committed | Voted
    | Survey | Look | AskCheckpoints | PersistAt | Inspect | Catalog
    | Welcome | RootBeat | Roster | Vote | News | Moved | Bind | Begin | Close | AskToStop | DumpStacks | Commit | Finish
    | Replicate | Advance | Quiet | Silent | Fetch | Fetched | Copied | Damaged | Alive | Trouble
    | Offer | Go | Kept | Later | NotKept | Ask | Serve | Lacks
    | Persist | Persisted | Complete | Completed | ListCheckpoints | Checkpoints | Load
    | Preload | Fork | Ready | Unfit | Forked | Task | Started | Listens | StopAsked | Failed
)  # fmt: skip
TO_AGENT = (Register, Stop, Inject, Inspect)  # from slot processes and visitors, of any installation
TO_SLOT = (Accepted, Follow, Refused, Ending, Stepped, Say, Ended, Committed, Catalog)  # and to visitors
TO_ROOT = (
    Join,
    Able,
    Unable,
    Stuck,
    RankListens,
    RankFailed,
    RankExited,
    Beat,
    Holds,
    Bound,
    Stored,
    Fetched,
    Copied,
    Damaged,
    Trouble,
    Persisted,
    Completed,
    Committed,
    Voted,
    Stop,
    Inject,
    Inspect,
)  # from workers, visitors
TO_WORKER = (
    Welcome,
    Refused,
    RootBeat,
    Roster,
    Vote,
    News,
    Moved,
    Bind,
    Survey,
    Look,
    AskCheckpoints,
    Fetch,
    Load,
    Begin,
    Advance,
    PersistAt,
    Persist,
    Complete,
    Close,
    AskToStop,
    DumpStacks,
    Commit,
    Say,
    Finish,
)  # from the root
TO_REPLICATOR = (Replicate, Advance, Quiet, Fetch)
FROM_REPLICATOR = (Silent, Fetched, Copied, Damaged, Alive, Trouble)
TO_KEEPER = (Offer, Ask)  # from the replicator that opened the connection
FROM_KEEPER = (Go, Kept, Later, NotKept, Serve, Lacks)
TO_PERSISTER = (Persist, Complete, ListCheckpoints, Load)
FROM_PERSISTER = (Persisted, Completed, Checkpoints, Fetched, Alive)
FROM_WARM = (Ready, Unfit)
TO_WARM = (Preload, Fork)
FROM_TRAINER = (Forked, Started, Listens, Failed)
TO_TRAINER = (Task, StopAsked, Commit)


def kind_of(message: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", message.__name__).lower()


def encode(message: Message) -> bytes:
    record = {"kind": kind_of(type(message)), **msgspec.to_builtins(message)}
    if "descriptors" in record:
        record["descriptors"] = len(record["descriptors"])
    if isinstance(message, TO_AGENT):
        record["protocol"] = PROTOCOL
    return json.dumps(record).encode() + b"\n"


def decode(line: bytes, expects: Sequence[type], descriptors: list[int]) -> Message:
    """The message in ``line``; takes its descriptors from the front of ``descriptors``.

    Raises:
        ValueError: it is none of ``expects``.
    """
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    kind = record.pop("kind", None) if isinstance(record, dict) else None
    of_kind = {kind_of(one): one for one in expects}
    if not isinstance(kind, str) or kind not in of_kind:
        raise ValueError(f"expected one of {', '.join(of_kind)}; got {kind!r}")
    wanted = of_kind[kind]
    if wanted in TO_AGENT and record.get("protocol") != PROTOCOL:
        raise OtherProtocol(f"{record.get('protocol')}")
    if any(one.name == "descriptors" for one in fields(wanted)):
        count = record.get("descriptors")
        if not isinstance(count, int) or not 0 <= count <= len(descriptors):
            raise ValueError(f"{kind}: said {count!r} descriptors, {len(descriptors)} came")
        record["descriptors"], descriptors[:] = descriptors[:count], descriptors[count:]
    try:
        message: Message = msgspec.convert(record, wanted, str_keys=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{kind}: {error}") from None
    return message


class OtherProtocol(ValueError):
    """The peer speaks another protocol; the text is its number."""


class Channel:
    """One end of a stream socket. ``closed`` becomes true when the peer is gone, does not read, or sent a bad message.

    The socket itself stays open until :meth:`close`: a selector may hold its number, which must not be used again before.

    Attributes:
        expects: classes of the messages that may come.
        complaint: what was wrong with the bad message; None if there was none.
    """

    def __init__(self, sock: socket.socket, expects: Sequence[type]):
        sock.setblocking(False)
        self.sock, self.expects = sock, expects
        self.closed = False
        self.complaint: ValueError | None = None
        self._received = bytearray()
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def is_connected(self) -> bool:
        return True

    def unacknowledged_s(self) -> float:
        """For how long the peer's machine has shown no life; inf: this kind of socket does not tell."""
        return math.inf

    def send(self, message: Message, timeout_s: float = 0.0) -> bool:
        """Whether the kernel took all of it. The peer gets copies of the message's descriptors."""
        if self.closed:
            return False
        descriptors = getattr(message, "descriptors", [])
        data = memoryview(encode(message))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        deadline = time.monotonic() + timeout_s
        while data:
            try:
                data = data[self.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL) :]
                ancillary = []
            except (BlockingIOError, InterruptedError):
                left = deadline - time.monotonic()
                if left <= 0:
                    self.closed = True
                    return False
                select.select([], [self.sock], [], left)
            except OSError:
                return False  # gone: receive() still reads its last messages, and then the end of the stream
        return True

    def receive(self) -> list[Message]:
        """The complete messages that have come; never waits. A peer that never stops sending keeps nobody in here."""
        complete = False
        while not self.closed and not (complete and len(self._received) > READ_BYTES):
            try:
                room = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
                data, ancillary, _, _ = self.sock.recvmsg(1 << 16, room, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.closed = True
                break
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i")
                    numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                    self._descriptors += numbers
            self._received += data
            complete = complete or b"\n" in data
            if len(self._received) > MAX_MESSAGE_BYTES:
                self.complaint = ValueError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
            if not data or self.complaint:
                self.closed = True
        messages = []
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        for line in lines:
            try:
                messages.append(decode(self._opened(bytes(line)), self.expects, self._descriptors))
            except ValueError as error:
                self.complaint = error
                self.closed = not isinstance(error, OtherProtocol)  # such a peer still gets an answer
                break
        return messages

    def _opened(self, line: bytes) -> bytes:
        """The message in a line; raises ValueError if it is not the peer's."""
        return line

    def wait(self, timeout_s: float) -> list[Message]:
        """Wait until something comes or ``timeout_s`` have passed; then :meth:`receive`."""
        select.select([self], [], [], timeout_s)
        return self.receive()

    def close(self) -> None:
        self.closed = True
        self.sock.close()
        for descriptor in self._descriptors:  # of messages that never became complete
            os.close(descriptor)
        self._descriptors = []


def pair(ours: Sequence[type]) -> tuple[Channel, socket.socket]:
    """A channel that expects ``ours``, and the other end's socket."""
    here, there = socket.socketpair()
    return Channel(here, ours), there


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path``, mode 0600, in a folder that only this user may enter. Replaces an older file there.

    It is bound under its final name: a temporary one would stay behind if this process were killed before the rename.
    """
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(os.fspath(path))
    os.chmod(path, 0o600)
    sock.listen(1024)
    sock.setblocking(False)
    return sock


def connect(path: Path) -> Channel | None:
    """A channel to the agent that listens at ``path``, or None when no process of this user does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(5.0)
    try:
        sock.connect(os.fspath(path))
    except OSError:
        sock.close()
        return None
    if peer(sock)[1] != os.getuid():
        sock.close()
        return None
    return Channel(sock, TO_SLOT)


def peer(sock: socket.socket) -> tuple[int, int]:
    """Pid and uid of the process at the other end, as the kernel vouches for them."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid
