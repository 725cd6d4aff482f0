"""METIS through the shared library that pymetis ships, in a child process.

pymetis' Python call takes one weight per vertex. METIS balances several at once (nodes, seeds, edges), and the C entry
point for it, ``METIS_PartGraphKway`` (Karypis & Kumar, "Multilevel algorithms for multi-constraint graph partitioning",
SC 1998), is exported by pymetis' extension module. So both cases take the same road here: ctypes on that library.

METIS does not check its input and crashes on an asymmetric one, so nothing but what :func:`symmetrise` made goes in.
It also catches SIGTERM, cannot be interrupted for minutes, writes to stdout and uses the process' random numbers. Hence
the child: forked after everything is prepared, it shares the graph copy-on-write, makes that one C call and leaves
with its status; the parts come back through a shared mapping. Ctrl-C kills it, so does the death of its parent,
its memory goes back at once, and its crash is an error message.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from gemini_gnn.errors import PartitionError

_OK, _OUT_OF_MEMORY = 1, -3
_STATUS_OFFSET = 100  # exit codes are not negative
_PR_SET_PDEATHSIG = 1
_NUM_OPTIONS = 40  # METIS_NOPTIONS


@dataclass(frozen=True)
class Adjacency:
    """A symmetric graph without self-loops, as METIS wants it.

    Attributes:
        pointers: ``[nodes + 1]``, neighbors: ``[pairs]``, in METIS' integer type, neighbors ascending.
        weight: ``[pairs]``, how many directed edges of the graph connect the two nodes, or None where all are alike.
    """

    pointers: np.ndarray
    neighbors: np.ndarray
    weight: np.ndarray | None


def symmetrise(colptr: np.ndarray, row: np.ndarray) -> Adjacency:
    """The :class:`Adjacency` of a directed graph; the cut METIS minimises is then the number of cut directed edges.

    Args:
        colptr: int64 ``[nodes + 1]``, row: integer ``[edges]``, in-edges by target; duplicates and self-loops allowed.

    Raises:
        PartitionError: more pairs than METIS' integers can count.
    """
    import pymetis
    from scipy.sparse import csc_array

    kind = pymetis.zero_copy_dtype()
    n = len(colptr) - 1
    if max(n, 2 * len(row)) > np.iinfo(kind).max:
        raise PartitionError(
            f"expected at most {np.iinfo(kind).max // 2} edges ({kind} METIS); got {len(row)}; "
            "use partition.method=hash"
        )
    target = np.repeat(np.arange(n, dtype=row.dtype), np.diff(colptr))
    proper = row != target
    pointers = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(target[proper], minlength=n), out=pointers[1:])
    del target
    row = row[proper]
    del proper
    if len(row) < 2**30:  # scipy then works with 4-byte indices from end to end
        pointers, row = pointers.astype(np.int32), row.astype(np.int32, copy=False)
    directed = csc_array((np.ones(len(row), dtype=np.int32), row, pointers), shape=(n, n))
    both = (directed + directed.T.tocsc()).tocsc()  # the sum of two canonical matrices: duplicates summed, sorted
    both.sum_duplicates()
    del directed, row, pointers
    weight = both.data
    alike = len(weight) == 0 or int(weight.min()) == int(weight.max())
    return Adjacency(
        both.indptr.astype(kind, copy=False),
        both.indices.astype(kind, copy=False),
        None if alike else weight.astype(kind, copy=False),
    )


def part_graph(
    adjacency: Adjacency,
    parts: int,
    vertex_weights: np.ndarray | None = None,
    *,
    seed: int = 0,
    imbalance: float = 0.03,
    recursive: bool = False,
) -> np.ndarray:
    """Cut a graph into ``parts`` with few edges between them.

    Args:
        adjacency: from :func:`symmetrise`.
        parts: at least 2.
        vertex_weights: non-negative integers ``[nodes, constraints]``; the sum of every column is balanced over the
            parts. None: every node counts 1.
        seed: of METIS' random numbers; the result is a pure function of the arguments.
        imbalance: allowed (largest part / mean - 1) of every column; METIS may miss it when columns contradict.

    Returns:
        int32 ``[nodes]``, the part of each node. Parts may be empty.

    Raises:
        PartitionError: METIS reports an error, or this build of pymetis hides METIS.
    """
    import pymetis
    from pymetis import _internal

    library: Any = _internal
    kind = pymetis.zero_copy_dtype()
    n = len(adjacency.pointers) - 1
    try:
        entry = getattr(
            ctypes.CDLL(library.__file__), "METIS_PartGraphRecursive" if recursive else "METIS_PartGraphKway"
        )
    except (OSError, AttributeError) as error:
        raise PartitionError(
            f"expected METIS inside {library.__file__}; {error}. Install the wheel (pip install 'pymetis>=2025.2.2'), "
            "or use partition.method=hash"
        ) from None
    entry.restype = ctypes.c_int

    options = np.full(_NUM_OPTIONS, -1, dtype=kind)
    options[int(library.options_indices.SEED)] = seed % 2**31
    options[int(library.options_indices.UFACTOR)] = round(1000 * imbalance)
    options[int(library.options_indices.NUMBERING)] = 0
    weights = None if vertex_weights is None else np.ascontiguousarray(vertex_weights, dtype=kind)
    part = np.frombuffer(mmap.mmap(-1, n * kind.itemsize), dtype=kind)  # shared with the child
    arrays = {
        "nvtxs": np.array([n], dtype=kind),
        "ncon": np.array([1 if weights is None or weights.ndim == 1 else weights.shape[1]], dtype=kind),
        "xadj": adjacency.pointers,
        "adjncy": adjacency.neighbors,
        "vwgt": weights,
        "vsize": None,
        "adjwgt": adjacency.weight,
        "nparts": np.array([parts], dtype=kind),
        "tpwgts": None,  # equal shares
        "ubvec": None,  # the UFACTOR option for every constraint: no need to know the width of METIS' floats
        "options": options,
        "edgecut": np.zeros(1, dtype=kind),
        "part": part,
    }
    for name, array in arrays.items():
        assert array is None or (array.dtype == kind and array.flags.c_contiguous), name
    pointers = [None if array is None else ctypes.c_void_p(array.ctypes.data) for array in arrays.values()]
    status = in_child(lambda: entry(*pointers))
    if status != _OK:
        why = {_OUT_OF_MEMORY: "not enough memory", -signal.SIGKILL: "killed, perhaps for lack of memory"}
        raise PartitionError(
            f"METIS could not cut {n} nodes into {parts} parts ({why.get(status, f'status {status}')}); "
            "use fewer parts or partition.method=hash"
        )
    return part.astype(np.int32)


def in_child(call: Callable[[], int]) -> int:
    """The small integer that ``call`` returns in a forked child, or minus the signal that ended the child.

    Nothing else comes back but what ``call`` writes to shared memory; stdout goes nowhere. It must not need a lock that
    another thread of this process may hold.

    Raises:
        PartitionError: no child could be made.
    """
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child is known to the handler below
    child = -1
    try:
        child = os.fork()
        if child == 0:
            _be_child(call, prctl, parent, nowhere)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        _, how = os.waitpid(child, 0)  # as long as METIS takes; signals such as Ctrl-C get through
    except OSError as error:
        raise PartitionError(f"METIS needs a process of its own: {error.strerror}; free some memory") from error
    except BaseException:
        if child > 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        os.close(nowhere)
    code = os.waitstatus_to_exitcode(how)
    return code if code < 0 else code - _STATUS_OFFSET


def _be_child(call: Callable[[], int], prctl: Any, parent: int, nowhere: int) -> NoReturn:
    try:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(nowhere, 1)
        if os.getppid() == parent:
            os._exit(call() + _STATUS_OFFSET)
    finally:
        os._exit(_STATUS_OFFSET)
