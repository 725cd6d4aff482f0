"""gemini_gnn: distributed GNN training that resumes from host memory after its processes are killed.

In Python: :func:`partition`, :func:`train`, :func:`load`. Nothing heavy is imported before one of them is used.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load", "partition", "predict", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from gemini_gnn import api

        return getattr(api, name)
    raise AttributeError(f"module 'gemini_gnn' has no attribute {name!r}")
