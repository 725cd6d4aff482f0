"""What runs on this machine: the package's sources, and the versions that its results depend on. Loads none of them."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path


@functools.cache
def sources() -> str:
    """A short hash of the package's source files."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def version(package: str) -> str:
    """As installed; "none" where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def code() -> str:
    """What this process runs, in words that are the same on machines that may work together."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed"))
    return f"gemini_gnn with sources {sources()}, Python {platform.python_version()}, {versions}"
