"""The machines of a hostfile or an allocation; and the launcher, started as it should be.

DeepSpeed asks only the first host, says nothing of the others until they hang, forwards almost no environment, and its
ssh waits for ever for a host that lost power. ``doctor/`` finds out first; :func:`launcher_environment` adds what the
launcher needs.
"""

from __future__ import annotations

import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from gemini_gnn.cluster.launcher import DEEPSPEED
from gemini_gnn.cluster.place import expand_nodes, expand_tasks, unequal
from gemini_gnn.errors import ClusterError

KEEPALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"  # a dead host is given up after 15-20 s
FORWARDED = ("GEMINI_GNN_", "NCCL_", "OMP_", "DS_ACCELERATOR")  # and whatever .deepspeed_env files say


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


def allocated(environ: Mapping[str, str]) -> list[tuple[str, int]]:
    """``[(host, slots)]`` of the SLURM allocation that ``environ`` is in; empty outside of one. Pure.

    Raises:
        ClusterError: SLURM's variables contradict each other; or nodes have unequal numbers of tasks.
    """
    nodes = expand_nodes(environ.get("SLURM_JOB_NODELIST", ""))
    tasks = expand_tasks(environ.get("SLURM_TASKS_PER_NODE", "")) or [1] * len(nodes)
    if nodes and not len(nodes) == len(tasks) == int(environ.get("SLURM_JOB_NUM_NODES", len(nodes))):
        raise ClusterError(
            f"SLURM's variables contradict each other: SLURM_JOB_NODELIST names {len(nodes)} machines, SLURM_TASKS_PER_NODE "
            f"{len(tasks)}, SLURM_JOB_NUM_NODES says {environ.get('SLURM_JOB_NUM_NODES')}; are some of another job exported here?"
        )
    if len(set(tasks)) > 1:
        raise ClusterError(unequal(f"SLURM_TASKS_PER_NODE={environ['SLURM_TASKS_PER_NODE']}"))
    return list(zip(nodes, tasks, strict=True))


def keeps_alive(ssh_settings: str, environ: Mapping[str, str]) -> bool:
    """Whether the launcher's ssh notices a dead host: by ``ssh -G``'s output, or by pdsh's environment. Pure."""
    found = re.search(r"^serveraliveinterval (\d+)", ssh_settings, re.MULTILINE)
    return bool(found and int(found[1])) or "ServerAliveInterval" in environ.get("PDSH_SSH_ARGS_APPEND", "")


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


def run(path: Path, machines: int, address: str | None, command: Sequence[str], environ: Mapping[str, str]) -> int:
    """``deepspeed --hostfile path command...`` on ``machines`` that have answered; returns its exit code.

    Options of deepspeed may stand before the script in ``command`` and win over what is chosen here.

    Args:
        address: of the first machine as the others see it; None: they do not agree, and deepspeed has to choose.

    Raises:
        ClusterError: there are several machines, and pdsh, which starts them, is not here, or a path has a blank.
    """
    for folder in (str(Path.cwd()), sys.executable) if machines > 1 else ():
        if " " in folder:
            raise ClusterError(
                "expected a path without blanks, since deepspeed writes it unquoted into the shell of the other "
                f"machines; got {folder!r}. Move the project, or make a link without blanks, cd there, and make .venv anew"
            )
    if machines > 1 and not shutil.which("pdsh") and not any(word.startswith("--launcher") for word in command):
        raise ClusterError("deepspeed starts the other machines with pdsh, which is not here: apt-get install pdsh")
    chosen = ["--hostfile", str(path), "--master_port", str(random_port())]
    if address is not None and machines > 1:
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
