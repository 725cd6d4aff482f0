"""The first and last moments of a trainer: from its fork to the user's function, and its end.

A fresh fork takes the trainers' lock, sends its pid to the agent, and waits for its task; it does nothing else before. If
the agent closes the connection, the trainer exits at once, even if it is forked only later.

A trainer owns nothing that outlives it: the kernel kills it with the agent (PDEATHSIG), and the agent owns the arena and the
run directory. It may be killed at any instruction. It sends its last words (``Failed``) to the agent over its own socket,
before its connections to other trainers close; the agent reads them before it counts the exit. SIGTERM, SIGINT and SIGHUP
do not end a trainer. A launcher or scheduler sends them to every process it finds, but the agent decides when the job ends,
so that the trainers can agree on the last step.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from gemini_gnn.cluster.place import threads
from gemini_gnn.errors import GeminiError, RecoveryError
from gemini_gnn.faults import injection
from gemini_gnn.observe import logs
from gemini_gnn.observe.errors import is_consequence
from gemini_gnn.recovery import board, messages, processes
from gemini_gnn.recovery.outcome import STOPPED
from gemini_gnn.snapshot import context
from gemini_gnn.snapshot.store import locks

__all__ = ["STOPPED", "stop_requested"]

TASK_S = 60.0  # until the agent has sent a task
OOM_SCORE_ADJ = 300  # if memory is short, the kernel kills a trainer before the agent and other programs

_agent: messages.Channel | None = None
_listening = False
_stop = False


def stop_requested() -> bool:
    """Whether the agent has asked this trainer to end in order; cheap enough for every step.

    A caller promises to go on calling it. If one trainer has never called it, the agent kills all without waiting. Ranks
    may see the request at different steps, so they must agree on the last one (a reduced flag) before they act on it.
    Then they return :data:`STOPPED`, or 0 if that was the end of the work anyway. False without an agent. Faults that
    ``inject.py`` wants from this trainer strike here.
    """
    global _listening, _stop
    if _agent is None or _stop:
        return _stop
    if not _listening:
        _listening = _agent.send(messages.Listens(), timeout_s=1.0)
    received = _agent.receive()
    _stop = messages.StopAsked() in received
    for message in received:
        if isinstance(message, messages.Commit):
            injection.order(message.fault)
    return _stop


def run(descriptor: int, added: dict[str, str], arena: Path) -> NoReturn:
    """The life of a fresh fork: get a task, call its function, exit with the code that it returns.

    Args:
        descriptor: its socket to the agent, which is its parent.
        added: variables that the warm parent's imports put into the environment.
    """
    os.setsid()  # a process group of its own: the agent kills it with the processes it starts
    locks.hold_trainers_lock(arena)  # before it writes anything: see living_trainer
    agent = messages.Channel(socket.socket(fileno=descriptor), messages.TO_TRAINER)
    agent.send(messages.Forked(os.getpid()), timeout_s=5.0)
    task = _await_task(agent)
    if task is None:
        os._exit(1)  # the agent is gone, or the job goes on without this trainer
    failure: messages.Failed | None = None
    try:
        _become(task, agent, added)
        function = _resolve(task.target)
        agent.send(messages.Started(time.monotonic()), timeout_s=1.0)
        listen_fd = task.descriptors[0] if task.descriptors else None
        code = function(task.payload, task.place, listen_fd) or 0
        if not isinstance(code, int) or not 0 <= code < 128:
            raise TypeError(f"{task.target} must return an exit code of 0..127 or None, not {code!r}")
    except SystemExit as ending:
        code, failure = _exit_code(ending)
    except BaseException as error:
        code, text = (error.exit_code, str(error)) if isinstance(error, GeminiError) else (1, traceback.format_exc())
        summary = f"{type(error).__name__}: {error}"
        failure = messages.Failed(code, time.monotonic(), summary[:2000], text[-20_000:], is_consequence(error))
    # The agent writes it into the log once it knows the first error; other trainers' logs get one line.
    if failure is not None and not agent.send(failure, timeout_s=5.0):
        print(failure.text, file=sys.stderr, flush=True)
    _leave(code)


def _await_task(agent: messages.Channel) -> messages.Task | None:
    deadline = time.monotonic() + TASK_S
    while not agent.closed and (left := deadline - time.monotonic()) > 0:
        for message in agent.wait(left):
            if isinstance(message, messages.Task):
                return message
    return None


def _become(task: messages.Task, agent: messages.Channel, added: dict[str, str]) -> None:
    """Turn a fresh fork into the trainer of ``task``."""
    global _agent
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(
            number, lambda *_: None
        )  # a handler, not SIG_IGN: programs that the trainer starts have the default again
        signal.siginterrupt(number, False)
    logs.redirect(Path(task.log))
    # Written by the handler in C: one in Python waits for the interpreter, which a hanging call never comes back to.
    faulthandler.register(processes.DUMP_STACKS, file=2, all_threads=True, chain=False)
    _agent = agent
    place = task.place
    board.attach(Path(task.arena), place.local_rank, task.generation)
    begin = logs.header(place.rank, place.machine, os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
    print(begin, end="", flush=True)  # other ranks read this rank's machine there
    processes.name_this(f"gnn-rank-{place.rank}")
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    except OSError as error:  # some containers forbid it; then the kernel chooses as it likes
        print(f"warning: cannot set oom_score_adj: {error.strerror}", file=sys.stderr)
    try:
        os.sched_setaffinity(
            0, task.cores
        )  # the agent, and so this fork, has those of the slot process that started the agent
    except OSError as error:
        print(f"warning: cannot run on the cores {task.cores} of the slot process: {error.strerror}", file=sys.stderr)
    os.environ.clear()
    os.environ.update(added | task.environment)
    os.chdir(task.folder)
    sys.path[:] = task.path
    sys.argv[:] = task.command
    _reseed()
    _threads(task.sharing)
    context.install(context_of(task))


def context_of(task: messages.Task) -> context.Context:
    """The trainer's side of its job, with the board as its way to the agent and back."""
    place = task.place
    return context.Context(
        job=task.job,
        arena=Path(task.arena),
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        term=task.term,
        generation=task.generation,
        resume=task.resume,
        attaching=board.attaching,
        restored=board.restored,
        stepped=board.stepped,
        committed=board.committed,
        replicas=task.replicas,
        kept=tuple(task.kept),
        recoverable=board.recoverable,
        persist_at=board.persist_at,
        hold=board.hold,
    )


def _leave(code: int) -> NoReturn:
    """Exit as a process of its own would, but not through the interpreter's teardown of a forked heap."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # joins non-daemon threads
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        code = code or 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # disk full, or closed by the user's code
                code = code or 1
        os._exit(code)


def _exit_code(ending: SystemExit) -> tuple[int, messages.Failed | None]:
    """The exit code that a shell would see of ``sys.exit(x)``."""
    if ending.code is None or ending.code == 0:
        return 0, None
    code, text = 1, str(ending.code)
    if isinstance(ending.code, int):
        code, text = ending.code & 0xFF, f"the script called sys.exit({ending.code})"
        if code in (0, STOPPED):
            return code, None
    return code, messages.Failed(code, time.monotonic(), f"SystemExit: {ending.code}", text, False)


def _resolve(target: str) -> Any:
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise RecoveryError(f"expected a target 'package.module:function'; got {target!r}")
    return function


def _reseed() -> None:
    """Give this fork the random state of a new process, not that of its parent.

    Python's and NumPy's generators come from the operating system; torch's is the same constant in every new process, which
    scripts that never seed rely on.
    """
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(torch._C.default_generator.initial_seed())


def _threads(sharing: int) -> None:
    """Set torch's number of threads. The parent had one, to be able to fork; a trainer has those of a new process, or its share.

    ``sharing``: ranks that run on the same cores.
    """
    if "torch" in sys.modules:
        number = threads(os.environ, len(os.sched_getaffinity(0)), sharing)
        sys.modules["torch"].set_num_threads(number)
