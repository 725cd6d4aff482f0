"""Snapshots of a training in host memory that outlive its processes. Knows nothing of graphs.

Importing this package imports nothing heavy: worker agents use its ``store`` and ``context`` without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemini_gnn.snapshot.store.identity import Identity

if TYPE_CHECKING:
    from gemini_gnn.snapshot.session import attach

__all__ = ["Identity", "attach"]


def __getattr__(name: str) -> Any:
    if name == "attach":
        from gemini_gnn.snapshot.session import attach

        return attach
    raise AttributeError(f"module 'gemini_gnn.snapshot' has no attribute {name!r}")
