"""A cluster on one machine, to see distributed training fail without owning a cluster. See docs/lab.md."""

from tests.lab.lab import Lab, LabError, missing

__all__ = ["Lab", "LabError", "missing"]
