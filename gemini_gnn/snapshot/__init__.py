"""Snapshots of a training in host memory that outlive its processes. Knows nothing of graphs.

Importing this package imports nothing heavy: worker agents use its ``arena`` and ``context`` without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gemini_gnn.snapshot.store.identity import Identity

if TYPE_CHECKING:
    from gemini_gnn.snapshot.capture.snapshots import Snapshots
    from gemini_gnn.snapshot.context import Context

__all__ = ["Identity", "attach"]


def attach(
    engine: Any,
    extra_state: Any = None,
    *,
    context: Context | None = None,
    every: int = 1,
    agree: Callable[[bool], bool] | None = None,
    group: Any = None,
    hook: bool = True,
    timeout_s: float = 120.0,
    steps_done: int = 0,
) -> Snapshots:
    """Go on from the newest snapshot in host memory, or take the first one; from then on take one after each step.

    Call it once, on every rank, after the engine is built and before its first step. Collective.

    The state is what holds when a step *returns*: parameters, moments, buffers, scheduler, counters, random generators,
    and ``extra_state``, whose ``state_dict()`` is called at the end of the step that is being captured. So update your own
    counters ("step s is done") before calling ``step``.

    Between two steps only forward and backward may run: parameters are copied meanwhile. Whatever else changes them (clipping
    weights after the step, a momentum encoder updated in forward) calls ``before_step()`` of what is returned here first,
    which waits until they are copied. Otherwise the snapshot is not committed and the next call raises SnapshotError;
    changes in place through ``.data`` are not noticed, because torch does not count them.

    Args:
        engine: a DeepSpeed engine (ZeRO 0-3, fp32 or bf16), or ``(module, optimizer)`` or ``(module, optimizer,
            scheduler)`` of plain PyTorch. With a scheduler, a step ends when ``scheduler.step()`` returns.
        extra_state: an object with ``state_dict()`` and ``load_state_dict(dict)``: JSON values, numpy arrays, tensors.
            Small: it is copied while training waits.
        context: who this process is; installed by ``python -m gemini_gnn.run`` where it is not given.
        every: steps between snapshots.
        agree: minimum of a bit over all ranks; default: one small all_reduce.
        group: a gloo group of all ranks for the agreements; made here where it is None.
        hook: wrap the engine's ``step`` (or the optimizer's and scheduler's), so that nothing else is to be done.
            ``False``: the caller calls ``before_step``, ``ready`` and ``after_step`` itself.
        timeout_s: of the agreements and of every wait.
        steps_done: as the caller's own records say, on any rank. Where they or a snapshot tell of steps that were done, and no
            snapshot can be restored, the run does not begin again unless it was started with ``resume=never``.

    Returns:
        The snapshots of this rank; ``.restored`` says whether and where training goes on.

    Raises:
        SnapshotError: no worker agent; not enough host memory (before training, with needed and available); steps were done
            and no snapshot can be restored (nothing was changed then); what is in memory belongs to another job, topology,
            shape or format; ``resume=must`` and there is nothing.
    """
    from gemini_gnn.snapshot.session import attach as run

    return run(
        engine,
        extra_state,
        context=context,
        every=every,
        agree=agree,
        group=group,
        hook=hook,
        timeout_s=timeout_s,
        steps_done=steps_done,
    )
