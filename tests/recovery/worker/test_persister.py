"""The persister as a process: each order has an answer, whatever goes wrong; it ends with its agent."""

import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gemini_gnn.observe import terms
from gemini_gnn.recovery import messages, processes
from gemini_gnn.recovery.worker import helpers, persister
from gemini_gnn.snapshot import persist
from gemini_gnn.snapshot.store import arena, locks
from gemini_gnn.snapshot.store.identity import Identity
from tests.snapshot.plain_training import arena_folder, run_some, slots_of

SHARDS = ["common", "rank-00000"]
PATIENCE_S = 60.0


@pytest.fixture
def memory():
    with arena_folder() as path:
        run_some(path, 3)
        yield path


def command(memory: Path, run_dir: Path, folder: Path, channel: int) -> list[str]:
    said = [
        "--arena",
        memory,
        "--run-dir",
        run_dir,
        "--folder",
        folder,
        "--keep",
        2,
        "--job",
        "job",
        "--channel",
        channel,
    ]
    return [sys.executable, "-P", "-m", "gemini_gnn.recovery.worker.persister", *map(str, said)]


class Agent:
    """The agent's end."""

    def __init__(self, memory, run_dir, folder=None):
        self.channel, theirs = messages.pair(messages.FROM_PERSISTER)
        started = command(memory, run_dir, folder or run_dir / "checkpoints", theirs.fileno())
        self.process = subprocess.Popen(started, pass_fds=[theirs.fileno()])
        theirs.close()

    def ask(self, order):
        assert self.channel.send(order, timeout_s=10.0)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not self.channel.closed:
            said = self.channel.wait(deadline - time.monotonic())
            if answers := [one for one in said if one != messages.Alive()]:  # on a busy machine a load takes seconds
                (answer,) = answers
                return answer
        raise AssertionError(f"no answer to {order}")


@contextmanager
def agent_of(*arguments):
    agent = Agent(*arguments)
    try:
        yield agent
    finally:
        agent.channel.close()
        agent.process.kill()
        agent.process.wait(PATIENCE_S)


def test_every_order_and_its_answer(memory, tmp_path):
    identity = Identity(1, 1, 3)
    with agent_of(memory, tmp_path) as agent:
        ask = agent.ask
        assert ask(messages.ListCheckpoints()) == messages.Checkpoints([], [])
        assert os.getpriority(os.PRIO_PROCESS, agent.process.pid) == 19
        assert "gnn-persister" in Path(f"/proc/{agent.process.pid}/comm").read_text()
        gone = ask(messages.Persist(Identity(1, 1, 9), SHARDS))
        assert gone.identity == (1, 1, 9) and "expected shard common of snapshot 1-1-9" in gone.problem
        assert "cannot read" in ask(messages.Complete(identity, SHARDS)).problem
        assert ask(messages.Persist(identity, SHARDS)) == messages.Persisted(identity)
        assert ask(messages.ListCheckpoints()) == messages.Checkpoints([], [])
        assert ask(messages.Complete(identity, SHARDS)) == messages.Completed(identity)
        assert ask(messages.ListCheckpoints()) == messages.Checkpoints([identity], [SHARDS])

        (miss,) = ask(messages.Load(5, Identity(1, 1, 2), ["common"])).misses
        assert "expected a complete checkpoint 1-1-2" in miss.text and not miss.damaged
        for _, slot in slots_of(memory, "common"):
            slot.void()
        here = tmp_path / "checkpoints" / persist.tag_of(3)
        file = here / "common.safetensors"
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        fetched = ask(messages.Load(6, identity, SHARDS))
        (miss,) = fetched.misses
        assert (fetched.attempt, miss.shard, miss.identity, miss.source) == (6, "common", identity, str(here))
        assert miss.damaged and "do not fit their checksum" in miss.text and not slots_of(memory, "common")
        file.unlink()
        (miss,) = ask(messages.Load(7, identity, ["common"])).misses
        assert not miss.damaged and "No such file" in miss.text
        file.write_bytes(good)
        assert ask(messages.Load(8, identity, SHARDS)) == messages.Fetched(8, [])
        assert [step for step, _ in slots_of(memory, "common")] == [3]

        agent.channel.close()
        assert agent.process.wait(PATIENCE_S) == 0


def test_what_goes_wrong_is_an_answer(memory, tmp_path):
    (tmp_path / "file").touch()
    with agent_of(memory, tmp_path, tmp_path / "file" / "folder") as agent:
        identity = Identity(1, 1, 3)
        assert "Not a directory" in agent.ask(messages.Persist(identity, SHARDS)).problem
        assert "Not a directory" in agent.ask(messages.ListCheckpoints()).problem
        assert "Not a directory" in agent.ask(messages.Load(1, identity, SHARDS)).misses[1].text
        assert "cannot complete" in agent.ask(messages.Complete(identity, SHARDS)).problem


def test_a_hanging_file_system_hangs_only_this_process(memory, tmp_path):
    """A pipe that nobody reads stands for it: to open it never ends."""
    identity = Identity(1, 1, 3)
    here = persist.partial_of(tmp_path / "checkpoints", identity)
    here.mkdir(parents=True)
    os.mkfifo(here / "common.safetensors")
    with agent_of(memory, tmp_path) as agent:
        assert agent.channel.send(messages.Persist(identity, SHARDS), timeout_s=10.0)
        deadline = time.monotonic() + PATIENCE_S
        while is_free(slots_of(memory, "common")[-1][1]):  # it pins the slot, then opens the pipe
            assert time.monotonic() < deadline and agent.process.poll() is None
            time.sleep(0.01)
        assert agent.channel.wait(0.0) == [] and not agent.channel.closed
        assert is_free(slots_of(memory, "common")[0][1]) and is_free(slots_of(memory, "rank-00000")[-1][1])
        assert locks.living_trainer(memory) is None  # the next start need not wait for the file system
        agent.process.kill()
        assert agent.process.wait(PATIENCE_S) == -signal.SIGKILL
        assert is_free(slots_of(memory, "common")[-1][1])
    (here / "common.safetensors").unlink()
    with agent_of(memory, tmp_path) as agent:
        assert agent.ask(messages.Persist(identity, SHARDS)) == messages.Persisted(identity)
        assert agent.ask(messages.Complete(identity, SHARDS)) == messages.Completed(identity)


def is_free(slot):
    free = slot.lock(exclusive=True)
    slot.unlock()
    return free


def test_it_dies_with_its_agent(memory, tmp_path):
    ours, theirs = socket.socketpair()
    starts = command(memory, tmp_path, tmp_path / "checkpoints", theirs.fileno())
    code = f"import subprocess, sys; subprocess.Popen({starts!r}, pass_fds=[{theirs.fileno()}]); sys.stdin.read()"
    agent = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.PIPE)
    channel = messages.Channel(ours, messages.FROM_PERSISTER)
    try:
        assert channel.send(messages.ListCheckpoints(), timeout_s=10.0)
        assert channel.wait(PATIENCE_S) == [messages.Checkpoints([], [])]
        (process,) = psutil.Process(agent.pid).children()
        handle = os.pidfd_open(process.pid)
        agent.kill()
        agent.wait(PATIENCE_S)
        # This test holds both ends of its channel: it is the kernel that ends it.
        ended, _, _ = select.select([handle], [], [], PATIENCE_S)
        assert ended
        os.close(handle)
    finally:
        agent.kill()
        agent.wait(PATIENCE_S)
        agent.stdin.close()
        channel.close()
        theirs.close()


def test_whose_checkpoints_count(memory, tmp_path):
    """A run directory may be moved; another job's folder is another job's."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    inside = persister.storage_of(memory, tmp_path / "link", tmp_path / "run" / "checkpoints", 2, "job")
    outside = persister.storage_of(memory, tmp_path / "run", tmp_path / "checkpoints", 2, "job")
    assert inside.inside and not outside.inside
    identity = Identity(1, 1, 3)
    assert not persister.obey(messages.Persist(identity, SHARDS), outside).problem
    assert not persister.obey(messages.Complete(identity, SHARDS), outside).problem
    os.rename(tmp_path / "checkpoints", tmp_path / "run" / "checkpoints")
    with arena_folder() as other:
        arena.make_folder(other)
        moved = persister.storage_of(other, tmp_path / "run", tmp_path / "run" / "checkpoints", 2, "moved")
        assert persister.obey(messages.ListCheckpoints(), moved).identities == [identity]
        assert persister.obey(messages.Load(1, identity, SHARDS), moved) == messages.Fetched(1, [])
        assert slots_of(other, "common")[0][1].header().job == "moved"
    foreign = persister.storage_of(memory, tmp_path / "else", tmp_path / "run" / "checkpoints", 2, "foreign")
    for order in (
        messages.ListCheckpoints(),
        messages.Persist(identity, SHARDS),
        messages.Complete(identity, []),
    ):
        problem = persister.obey(order, foreign).problem
        assert "step-000000003 is of job job" in problem and "Give each job a folder of its own" in problem
    (miss,) = persister.obey(messages.Load(1, identity, ["common"]), foreign).misses
    assert "step-000000003 is of job job" in miss.text
    assert persister.obey(messages.ListCheckpoints(), moved).identities == [identity]


class Log:
    """In place of the agent's journal."""

    def log(self, kind, **fields):
        pass


def test_what_nobody_wants_any_more_is_given_up_and_the_rest_is_done_by_the_next_one(memory, tmp_path):
    """It hangs in a load. It is gone before another one is started."""
    identity, run_dir = Identity(1, 1, 3), tmp_path / "run"
    here = run_dir / "checkpoints"
    storage = persister.storage_of(memory, run_dir, here, 2, "job")
    for order in (messages.Persist(identity, SHARDS), messages.Complete(identity, SHARDS)):
        assert not persister.obey(order, storage).problem
    file = here / persist.tag_of(3) / "common.safetensors"
    file.unlink()
    os.mkfifo(file)  # nobody writes into it: to open it never ends
    with selectors.DefaultSelector() as selector:
        helper = helpers.persister(memory, run_dir, here, 2, "job", Log(), selector)
        said: list[messages.Message] = []

        def until(done):
            deadline = time.monotonic() + PATIENCE_S
            while not done():
                assert time.monotonic() < deadline
                said.extend(helper.look(time.monotonic()))
                selector.select(0.01)
                processes.reap_children()

        try:
            helper.send(messages.Load(1, identity, ["common"]))
            helper.send(messages.ListCheckpoints())
            until(lambda: helper.pid and locks.living_trainer(memory) == helper.pid)
            first = helper.pid
            helper.give_up(messages.Load, messages.Persist)
            until(lambda: said)
            assert said == [messages.Checkpoints([identity], [SHARDS])] and helper.pid not in (0, first)
            assert locks.living_trainer(memory) is None
        finally:
            pid = helper.pid
            helper.close()
            processes.reap_child(pid, PATIENCE_S)


def test_a_root_that_lost_its_term_completes_nothing(memory, tmp_path):
    """It may still ask for it, on the wrong side of a split network: the newer root may have gone back to an older snapshot."""
    terms.make_run_dir(tmp_path)
    assert terms.claim_term(tmp_path, {}) == 1
    storage = persister.storage_of(memory, tmp_path, tmp_path / "checkpoints", 2, "job")
    identity = Identity(1, 1, 3)
    assert not persister.obey(messages.Persist(identity, SHARDS), storage).problem
    assert terms.succeed(tmp_path, 1, {}, "nonce")
    problem = persister.obey(messages.Complete(identity, SHARDS, 1), storage).problem
    assert problem and persister.obey(messages.ListCheckpoints(), storage).identities == []
    assert not persister.obey(messages.Complete(identity, SHARDS, 2), storage).problem
    assert persister.obey(messages.ListCheckpoints(), storage).identities == [identity]
