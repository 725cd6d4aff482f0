"""Faults on purpose: which and when (``schedule``, pure), and the harm (``injection``). docs/recovery.md explains them."""
