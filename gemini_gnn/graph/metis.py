"""METIS through the shared library that pymetis ships.

pymetis' Python call takes one weight per vertex. METIS balances several at once (nodes, seeds, edges), and the C entry
point for it, ``METIS_PartGraphKway`` (Karypis & Kumar, "Multilevel algorithms for multi-constraint graph partitioning",
SC 1998), is exported by pymetis' extension module. So both cases take the same road here: ctypes on that library. The
call releases the GIL. METIS does not check its input and crashes on an asymmetric one, so nothing but
:class:`Adjacency` made by :func:`symmetrise` goes in.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemini_gnn.errors import PartitionError

_OK, _OUT_OF_MEMORY = 1, -3
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

    def integers(values) -> np.ndarray:
        return np.ascontiguousarray(values, dtype=kind)

    options = np.full(_NUM_OPTIONS, -1, dtype=kind)
    options[int(library.options_indices.SEED)] = seed % 2**31
    options[int(library.options_indices.UFACTOR)] = round(1000 * imbalance)
    options[int(library.options_indices.NUMBERING)] = 0
    weights = None if vertex_weights is None else integers(vertex_weights)
    constraints = 1 if weights is None or weights.ndim == 1 else weights.shape[1]
    arrays = {
        "nvtxs": integers([n]),
        "ncon": integers([constraints]),
        "xadj": adjacency.pointers,
        "adjncy": adjacency.neighbors,
        "vwgt": weights,
        "vsize": None,
        "adjwgt": adjacency.weight,
        "nparts": integers([parts]),
        "tpwgts": None,  # equal shares
        "ubvec": None,  # the UFACTOR option for every constraint: no need to know the width of METIS' floats
        "options": options,
        "edgecut": integers([0]),
        "part": np.zeros(n, dtype=kind),
    }
    for name, array in arrays.items():
        assert array is None or (array.dtype == kind and array.flags.c_contiguous), name
    status = entry(*(None if a is None else ctypes.c_void_p(a.ctypes.data) for a in arrays.values()))
    if status != _OK:
        why = "not enough memory" if status == _OUT_OF_MEMORY else f"status {status}"
        raise PartitionError(
            f"METIS could not cut {n} nodes into {parts} parts ({why}); use fewer parts or partition.method=hash"
        )
    part = arrays["part"]
    assert part is not None
    return part.astype(np.int32)
