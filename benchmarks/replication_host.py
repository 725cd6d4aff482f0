"""One host of replication.py: does what it is told, a line of JSON each way on stdin and stdout, until stdin ends.

{"do": "push", "step": 3}   ->   {"seconds": 0.91}
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemini_gnn.recovery import messages, processes, wire
from gemini_gnn.recovery.messages import Peer
from gemini_gnn.recovery.worker import helpers
from gemini_gnn.snapshot.store import arena
from gemini_gnn.snapshot.store.identity import Identity, shard_of
from tests.recovery.arenas import JOB, capture, ring

TOKEN = b"benchmark" * 4
LONGEST_S = 300.0  # of anything that is waited for


class Quiet:
    """In place of an agent's journal."""

    def log(self, kind: str, **fields: Any) -> None:
        pass


class Host:
    """A replicator without an agent, and the contenders that run beside it.

    Attributes:
        rank: of the only shard that is this host's own.
    """

    def __init__(self, rank: int, address: str):
        self.rank, self.address = rank, address
        self.arena = arena.make_folder(arena.folder_of(f"benchmark-{os.getpid()}-{rank}"))
        self.selector = selectors.DefaultSelector()
        self.listener = wire.listen(address, 0)
        token = helpers.secret(TOKEN)
        self.helper = helpers.replicator(self.arena, JOB, self.listener, token, Quiet(), self.selector, 1e9)  # type: ignore[arg-type]
        self.helper.look(time.monotonic())  # starts it
        self.peer = list(self.listener.getsockname()[:2])
        self.generation = 0
        self.sock: socket.socket | None = None
        self.manager: Any = None

    def close(self) -> None:
        pid = self.helper.pid
        self.helper.close()
        if pid:
            processes.reap_child(pid, LONGEST_S)
        arena.remove(self.arena)

    def until(self, wanted: Callable[[messages.Message], bool]) -> messages.Message:
        """The first message of the replicator that is ``wanted``."""
        deadline = time.monotonic() + LONGEST_S
        while True:
            now = time.monotonic()
            for message in self.helper.look(now):
                if wanted(message):
                    return message
                if isinstance(message, messages.Trouble) or now > deadline:
                    raise SystemExit(f"while waiting: {message}")
            if now > deadline:
                raise SystemExit(f"nothing within {LONGEST_S:.0f} s")
            self.selector.select(0.05)

    # --- copies -------------------------------------------------------------------------------------------------------

    def replicate(self, peers: list[list[Any]], kept: list[int]) -> dict:
        """Push to ``peers`` (name, address, port), and keep the shards of the ranks ``kept``."""
        self.generation += 1
        own, to = [shard_of(self.rank)], [Peer(*one) for one in peers]
        names = [shard_of(rank) for rank in kept]
        self.helper.send(messages.Replicate(1, self.generation, None, None, own, names, to, 0, 0.0))
        return {}

    def capture(self, step: int, nbytes: int) -> dict:
        capture(self.arena, shard_of(self.rank), step % 3, Identity(1, 1, step), nbytes)
        return {}

    def push(self, step: int) -> dict:
        """From the bell until all peers have the snapshot of ``step``, verified."""
        begin = time.perf_counter()
        with suppress(FileNotFoundError):  # the replicator is just starting, and will look
            ring(self.arena)
        self.until(lambda m: isinstance(m, messages.Copied) and m.identity.step == step)
        return {"seconds": time.perf_counter() - begin}

    def advance(self, step: int) -> dict:
        self.helper.send(messages.Advance(Identity(1, 1, step)))
        return {}

    def fetch(self, wanted: list[list[Any]], peer: list[Any]) -> dict:
        """Get the shards ``wanted`` (name, identity), as a machine does that has nothing."""
        for file in arena.slots(self.arena):
            file.close()
            file.path.unlink()
        orders = [messages.Wanted(shard, Identity(*identity), Peer(*peer)) for shard, identity in wanted]
        self.generation += 1
        begin = time.perf_counter()
        self.helper.send(messages.Fetch(self.generation, orders))
        answer = self.until(lambda m: isinstance(m, messages.Fetched))
        took = time.perf_counter() - begin
        assert isinstance(answer, messages.Fetched)
        if answer.misses:
            raise SystemExit(str(answer.misses))
        return {"seconds": took}

    # --- a bare socket ------------------------------------------------------------------------------------------------

    def listen(self, nbytes: int) -> dict:
        self.raw = self._mapping(nbytes)
        self.bare = socket.create_server((self.address, 0))
        return {"port": self.bare.getsockname()[1]}

    def accept(self) -> dict:
        self.bare.settimeout(LONGEST_S)
        self.sock, _ = self.bare.accept()
        self.sock.settimeout(LONGEST_S)
        return {}

    def connect(self, address: str, port: int, nbytes: int) -> dict:
        self.raw = self._mapping(nbytes)
        self.sock = socket.create_connection((address, port), LONGEST_S)
        return {}

    def send(self) -> dict:
        """From the mapping, until the peer says that it has all."""
        assert self.sock is not None
        begin = time.perf_counter()
        self.sock.sendall(self.raw)
        if self.sock.recv(1) != b"\0":
            raise SystemExit("the peer has closed the bare connection")
        return {"seconds": time.perf_counter() - begin}

    def receive(self) -> dict:
        assert self.sock is not None
        rest = memoryview(self.raw)
        while rest:
            rest = rest[self.sock.recv_into(rest) :]
        self.sock.sendall(b"\0")
        return {}

    def _mapping(self, nbytes: int) -> mmap.mmap:
        """As many bytes in host memory, mapped and touched."""
        with open(self.arena / "bare", "w+b") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            raw = mmap.mmap(file.fileno(), nbytes)
        for at in range(0, nbytes, 1 << 20):
            raw[at : at + (1 << 20)] = os.urandom(min(1 << 20, nbytes - at))
        return raw

    # --- trainings ----------------------------------------------------------------------------------------------------

    def train(self, nbytes: int, folder: str) -> dict:
        """Take one step, its snapshot, and DeepSpeed's checkpoint in ``folder``."""
        import snapshot

        from gemini_gnn.snapshot import attach

        self._alone()
        engine = snapshot.engine_of(nbytes)
        snapshots = attach(engine, context=snapshot.context_of(self.arena, 1))
        snapshot.step(engine)
        snapshots.wait()
        engine.save_checkpoint(folder, tag="x", save_latest=False)
        snapshots.close()
        engine.destroy()
        found = []
        for file in arena.slots(self.arena):
            view = file.view()
            file.close()
            if view.identity is not None and view.identity.step == 1:
                found.append([view.shard, list(view.identity)])
        return {"shards": found}

    def restore(self, nbytes: int) -> dict:
        """A fresh engine back to the state in this host's memory."""
        import snapshot

        from gemini_gnn.snapshot import attach

        self._alone()
        engine = snapshot.engine_of(nbytes)
        begin = time.perf_counter()
        snapshots = attach(engine, context=snapshot.context_of(self.arena, self.generation + 1))
        took = time.perf_counter() - begin
        assert snapshots.restored is not None and snapshots.restored.step == 1
        snapshots.close()
        engine.destroy()
        del engine
        gc.collect()
        return {"seconds": took}

    def load(self, nbytes: int, folder: str) -> dict:
        """A fresh engine back to the state in DeepSpeed's checkpoint."""
        import snapshot

        self._alone()
        engine = snapshot.engine_of(nbytes)
        begin = time.perf_counter()
        engine.load_checkpoint(folder, tag="x")
        took = time.perf_counter() - begin
        engine.destroy()
        del engine
        gc.collect()
        return {"seconds": took}

    def _alone(self) -> None:
        import torch

        torch.set_num_threads(1)
        os.environ["DS_ACCELERATOR"] = "cpu"

    # --- lm-resiliency ------------------------------------------------------------------------------------------------

    def peer_start(self, store: str, nbytes: int) -> dict:
        """Its manager on two ranks that keep each other's state; ``reason`` where it cannot be had."""
        try:
            from lm_resiliency.checkpointing import InMemoryCheckpointManager, InMemoryCkptConfig
        except ModuleNotFoundError as error:
            return {"reason": f"{error} (pip install lm-resiliency==0.2.0)"}
        import torch
        import torch.distributed as dist

        self._alone()
        dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=self.rank, world_size=2)
        self.tensors = [torch.randn(nbytes // 16) for _ in range(4)]
        settings = InMemoryCkptConfig(
            disk_flush_interval=0, disk_folder=f"{store}-{self.rank}", run_id="benchmark", pin_memory=False
        )
        self.manager = InMemoryCheckpointManager(settings)
        return {}

    def peer_exchange(self, step: int) -> dict:
        """From the state to its copy on the peer, and the peer's copy here; it knows no checksums then."""
        begin = time.perf_counter()
        self.manager.save_tensors(self.tensors, step)
        done = self.manager.finalize_replication()
        took = time.perf_counter() - begin
        if not done:
            raise SystemExit("lm-resiliency says that the copy has failed")
        return {"seconds": took}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    host = Host(int(sys.argv[1]), sys.argv[2])
    try:
        print(json.dumps({"peer": host.peer}), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(host, request.pop("do"))(**request)
            print(json.dumps({**answer, "peer": host.peer}), file=answers, flush=True)
    finally:
        host.close()


if __name__ == "__main__":
    main()
