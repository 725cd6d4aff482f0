"""The machines of a hostfile, asked before a job is started on them; and the launcher, started as it should be.

DeepSpeed asks only the first host, says nothing of the others until they hang, forwards almost no environment, and its
ssh waits for ever for a host that lost power. :func:`ask` finds out first, in parallel and within a deadline;
:func:`launcher_environment` adds what the launcher needs. Questions go over the same ssh the launcher will use.
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.cluster.place import unequal
from gemini_gnn.errors import ClusterError

KEEPALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"  # a dead host is given up after 15-20 s
FORWARDED = ("GEMINI_GNN_", "NCCL_", "OMP_", "DS_ACCELERATOR")  # and whatever .deepspeed_env files say

# Runs on each host with its first argument: what the others must agree with, and what they see of it.
QUESTIONS = """
import importlib.metadata as m, json, os, shutil, socket, sys
first, probe = sys.argv[1:]
import gemini_gnn
try:
    seen = socket.getaddrinfo(first.split("@")[-1], None, type=socket.SOCK_STREAM)[0][4][0]
except OSError:
    seen = None
print("ANSWER " + json.dumps(dict(
    machine=socket.gethostname(), cores=os.cpu_count(), shm_bytes=shutil.disk_usage("/dev/shm").free,
    python=sys.version.split()[0], torch=m.version("torch"), deepspeed=m.version("deepspeed"),
    project=os.path.dirname(gemini_gnn.__file__), first=seen, shared=os.path.exists(probe))))
"""
MUST_AGREE = ("python", "torch", "deepspeed", "project")


@dataclass(frozen=True)
class Answer:
    """The answer of one host: ``facts`` as printed by ``QUESTIONS``, or a ``problem`` and a command to try by hand."""

    host: str
    slots: int
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def check_hostfile(text: str) -> list[tuple[str, int]]:
    """``[(host, slots)]`` of a DeepSpeed hostfile, in its order, which is the order of ranks.

    One ``host slots=N`` per line; empty lines and ``#`` comments are skipped. Stricter than DeepSpeed's own reading,
    which ignores what follows the number (``slots=4x`` means 4) and takes hosts without a slot. A host is a name or an
    IPv4 address: pdsh reads what stands before a colon as a remote command type, so an IPv6 address needs a name.

    Raises:
        ClusterError: with the line number: malformed, twice the same host, no slots, unequal slots; or no host at all.
    """
    hosts: dict[str, tuple[int, int]] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if match is None or not re.fullmatch(r"(\w[\w.-]*@)?\w[\w.-]*", match[1], re.ASCII):
            raise ClusterError(f"hostfile line {number}: expected `host slots=N`, like `h0 slots=4`; got {line!r}")
        host, slots = match[1], int(match[2])
        if host in hosts:
            raise ClusterError(
                f"hostfile line {number}: {host} is already in line {hosts[host][1]}; "
                f"a host has one line, with all its slots: `{host} slots={hosts[host][0] + slots}`"
            )
        if slots == 0:
            raise ClusterError(f"hostfile line {number}: {host} has no slots; give it one, or comment the line out")
        hosts[host] = (slots, number)
    if not hosts:
        raise ClusterError("the hostfile names no host: expected lines like `h0 slots=4`")
    if len({slots for slots, _ in hosts.values()}) > 1:
        raise ClusterError(unequal(", ".join(f"{host} slots={slots}" for host, (slots, _) in hosts.items())))
    return [(host, slots) for host, (slots, _) in hosts.items()]


def read_hostfile(path: Path) -> list[tuple[str, int]]:
    """Checked ``[(host, slots)]``.

    Raises:
        ClusterError: no such file, or :func:`check_hostfile`'s complaints with its name in front.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"cannot read the hostfile {path}: {error}") from None
    try:
        return check_hostfile(text)
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from None


# --- asking -----------------------------------------------------------------------------------------------------------


def interpret(host: str, slots: int, seconds: float, code: int | None, said: str, folder: str) -> Answer:
    """Turn what ssh printed into an :class:`Answer`. Pure.

    Args:
        code: ssh's exit status; None: it did not come back in time.
    """
    lines = said.strip().splitlines()
    for line in lines:
        if code == 0 and line.startswith("ANSWER "):
            facts = json.loads(line.removeprefix("ANSWER "))
            problem = None
            if not facts["shared"]:
                problem = f"does not see a file just written into {folder} here; the machines must share a file system"
            return Answer(host, slots, seconds, facts, problem)
    last = lines[-1] if lines else "no word"
    by_hand = f"try by hand: ssh -v {host} true"
    if code is None:
        problem = f"no answer within {seconds:.0f} s: no power, no network, a wrong name, a firewall? {by_hand}"
    elif code != 255:
        here = f"{sys.executable} and {folder}"
        problem = f"ssh works, but not this environment ({last}); {here} must be there under the same paths"
    elif "Permission denied" in said:
        problem = f"refuses this user's key ({last}); `ssh-copy-id {host}`, then {by_hand}"
    elif "Host key verification failed" in said:
        problem = f"is not a known host; log in once: ssh {host} true"
    else:
        problem = f"cannot be reached ({last}); {by_hand}"
    return Answer(host, slots, seconds, {}, problem)


def ask(hosts: Sequence[tuple[str, int]], folder: Path, deadline_s: float = 20.0) -> list[Answer]:
    """Log in to all hosts at once and have them answer ``QUESTIONS``, within ``deadline_s`` in all.

    Args:
        folder: a folder all machines should share: the one the job is started in.
    """
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix=".gemini-gnn-probe-") as probe,
        ThreadPoolExecutor(max_workers=len(hosts)) as pool,
    ):
        question = [sys.executable, "-c", QUESTIONS, hosts[0][0], probe.name]
        remote = f"cd {shlex.quote(str(folder))} && {shlex.join(question)}"

        def one(host: str, slots: int) -> Answer:
            command = ["ssh", "-n", "-o", "BatchMode=yes", *shlex.split(KEEPALIVE), host, remote]
            begin, code = time.monotonic(), None
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=deadline_s)
                code, said = done.returncode, done.stderr + done.stdout
            except subprocess.TimeoutExpired:
                said = ""
            return interpret(host, slots, time.monotonic() - begin, code, said, str(folder))

        return list(pool.map(one, *zip(*hosts, strict=True)))


def disagreements(answers: Sequence[Answer]) -> list[str]:
    """The facts that must be the same on all machines and are not. All machines have answered. Pure."""
    found = []
    for name in MUST_AGREE:
        values: dict[str, list[str]] = {}
        for answer in answers:
            if answer.facts:
                values.setdefault(str(answer.facts[name]), []).append(answer.host)
        if len(values) > 1:
            told = "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in values.items())
            found.append(f"expected the same {name} everywhere; got {told}")
    machines: dict[str, list[str]] = {}
    for answer in answers:
        if answer.facts:
            machines.setdefault(answer.facts["machine"], []).append(answer.host)
    found += [f"{' and '.join(h)} are one machine, {m}; give it one line" for m, h in machines.items() if len(h) > 1]
    return found


def master_address(answers: Sequence[Answer]) -> str | None:
    """The first host's address as the *others* see it, which is the one that serves them; None when they do not agree.

    On itself a host's name may mean loopback, and the first of its addresses may be one only it has. Pure.
    """
    others = answers[1:] or answers
    seen = {answer.facts.get("first") for answer in others}
    return seen.pop() if len(seen) == 1 else None


def keeps_alive(ssh_settings: str, environ: Mapping[str, str]) -> bool:
    """Whether the launcher's ssh notices a dead host: by ``ssh -G``'s output, or by pdsh's environment. Pure."""
    found = re.search(r"^serveraliveinterval (\d+)", ssh_settings, re.MULTILINE)
    return bool(found and int(found[1])) or "ServerAliveInterval" in environ.get("PDSH_SSH_ARGS_APPEND", "")


def table(answers: Sequence[Answer]) -> str:
    """One line per host."""
    lines = [f"{'host':16} {'slots':>5}  answer"]
    for a in answers:
        if a.problem:
            lines.append(f"{a.host:16} {a.slots:>5}  FAILED: {a.problem}")
        else:
            f = a.facts
            lines.append(
                f"{a.host:16} {a.slots:>5}  {f['cores']} cores, {f['shm_bytes'] / 2**30:.1f} GiB free in /dev/shm, "
                f"torch {f['torch']}, deepspeed {f['deepspeed']}, {a.seconds:.1f} s"
            )
    return "\n".join(lines)


def check(path: Path, environ: Mapping[str, str], folder: Path, deadline_s: float = 20.0) -> list[Answer]:
    """Ask the machines of a hostfile, print what they said.

    Raises:
        ClusterError: the hostfile is wrong, a host did not answer as it should, or they do not agree.
    """
    hosts = read_hostfile(path)
    answers = ask(hosts, folder, deadline_s)
    print(table(answers), flush=True)
    settings = subprocess.run(["ssh", "-G", hosts[0][0]], capture_output=True, text=True, timeout=20).stdout
    if not keeps_alive(settings, environ):
        print(
            "warning: ssh does not notice a host that loses power, and the launcher would wait for it for ever: use "
            f'`launch/hosts.py run`, or export PDSH_SSH_ARGS_APPEND="{KEEPALIVE}", or set ServerAliveInterval in ~/.ssh/config'
        )
    bad = [answer.host for answer in answers if answer.problem]
    if bad:
        raise ClusterError(f"{len(bad)} of {len(answers)} hosts cannot take part: {', '.join(bad)}; see the table")
    if problems := disagreements(answers):
        raise ClusterError("; ".join(problems))
    return answers


# --- launching --------------------------------------------------------------------------------------------------------


def forwarded(environ: Mapping[str, str], files: Sequence[str]) -> str:
    """The text of a ``.deepspeed_env`` file: our variables, then those of existing such files, which win. Pure.

    The launcher puts them on a command line that everybody on the machines can read: secrets do not belong there.
    GLOO_SOCKET_IFNAME is not among them: cards have other names on other machines, each process finds its own.
    """
    ours = [f"{k}={v}" for k, v in sorted(environ.items()) if k.startswith(FORWARDED) and "\n" not in v]
    theirs = [line for text in files for line in text.splitlines() if "=" in line]
    return "".join(f"{line}\n" for line in [*ours, *theirs])


def launcher_environment(environ: Mapping[str, str], environment_file: Path) -> dict[str, str]:
    """The launcher's own environment: its ssh gives up dead hosts, the variables of ``environment_file`` travel. Pure."""
    changed = dict(environ) | {"DS_ENV_FILE": str(environment_file)}
    if "ServerAliveInterval" not in environ.get("PDSH_SSH_ARGS_APPEND", ""):
        changed["PDSH_SSH_ARGS_APPEND"] = f"{environ.get('PDSH_SSH_ARGS_APPEND', '')} {KEEPALIVE}".strip()
    return changed


def random_port() -> int:
    """For a job's rendezvous: below the range the kernel gives to clients, and hardly another job's."""
    return 10_000 + secrets.randbelow(20_000)


def run(path: Path, answers: Sequence[Answer], command: Sequence[str], environ: Mapping[str, str]) -> int:
    """``deepspeed --hostfile path command...`` on machines that have answered; returns its exit code.

    Options of deepspeed may stand before the script in ``command`` and win over what is chosen here.

    Raises:
        ClusterError: there are several machines, and pdsh, which starts them, is not here, or a path has a blank.
    """
    for folder in (str(Path.cwd()), sys.executable) if len(answers) > 1 else ():
        if " " in folder:
            raise ClusterError(
                "expected a path without blanks, since deepspeed writes it unquoted into the shell of the other "
                f"machines; got {folder!r}. Move the project, or make a link without blanks, cd there, and make .venv anew"
            )
    if len(answers) > 1 and not shutil.which("pdsh") and not any(word.startswith("--launcher") for word in command):
        raise ClusterError("deepspeed starts the other machines with pdsh, which is not here: apt-get install pdsh")
    chosen = ["--hostfile", str(path), "--master_port", str(random_port())]
    address = master_address(answers)
    if address is not None and len(answers) > 1:
        chosen += ["--master_addr", address]
    files = [f.read_text() for f in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")) if f.is_file()]
    with tempfile.NamedTemporaryFile("w", prefix="gemini-gnn-env-") as file:
        file.write(forwarded(environ, files))
        file.flush()
        process = subprocess.Popen([*DEEPSPEED, *chosen, *command], env=launcher_environment(environ, Path(file.name)))
        # Ctrl-C reaches the launcher by itself; it tells the hosts, and this process waits for it to have done so.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()
