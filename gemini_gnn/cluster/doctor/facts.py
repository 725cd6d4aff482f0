"""The facts of one machine that a job depends on. Reads and asks; changes nothing, loads no torch."""

from __future__ import annotations

import contextlib
import os
import platform
import pwd
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from gemini_gnn import cgroups
from gemini_gnn.cluster import installation

GPU_S = 10.0  # nvidia-smi hangs where a driver does
PACKAGES = ("torch", "deepspeed", "numpy", "numba")


def gather(first: str) -> dict[str, Any]:
    """Everything that is decided upon later, as JSON knows it.

    Args:
        first: the name of the job's first machine, to learn which address it has from here.
    """
    shm = shutil.disk_usage("/dev/shm")
    return {
        "machine": socket.gethostname(),
        "user": user(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: installation.version(name) for name in PACKAGES},
        "sources": installation.sources(),
        "project": str(Path(__file__).parents[3]),
        "executable": sys.executable,
        "first": _address(first),
        "shm_bytes": shm.total,
        "shm_free_bytes": shm.free,
        "memory_bytes": cgroups.machine_left(),
        "limit_bytes": min((left for _, left in cgroups.left()), default=None),
        "forgets_at_logout": forgets_at_logout(),
        "gpus": gpus(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def user() -> str:
    """The name of the user; in a container that has none for the number, the number."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _address(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def gpus() -> list[str]:
    """Names of the GPUs; what nvidia-smi complains of counts as none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=GPU_S, stdin=subprocess.DEVNULL)
    except (subprocess.TimeoutExpired, OSError) as error:
        print(f"nvidia-smi: {error}", file=sys.stderr)
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


# --- logout -----------------------------------------------------------------------------------------------------------


def forgets_at_logout(root: Path = Path("/"), uid: int | None = None) -> bool:
    """Whether systemd-logind removes this user's files in /dev/shm when the user's last session ends.

    It does so by default (``RemoveIPC=yes``), but not for system users, nor for users that linger.
    """
    uid = os.getuid() if uid is None else uid
    if uid < 1000 or not (root / "run/systemd/sessions").is_dir():
        return False
    if (root / "var/lib/systemd/linger" / user()).exists():
        return False
    texts = []
    for folder in ("usr/lib/systemd", "run/systemd", "etc/systemd"):
        for path in (root / folder / "logind.conf", *sorted((root / folder / "logind.conf.d").glob("*.conf"))):
            with contextlib.suppress(OSError):  # not there, or not for us to read: then the default holds
                texts.append(path.read_text())
    said = re.findall(r"^\s*RemoveIPC\s*=\s*(\w+)", "\n".join(texts), re.MULTILINE)
    return not said or said[-1].lower() in ("yes", "true", "on", "1")
