"""Compiled CPU loops over the edges of a block; :mod:`gemini_gnn.models.csr` calls them.

Every kernel writes the rows ``low..high-1`` of its output and nothing else, each row in one fixed order of edges. So rows
can be split among threads in any way without changing a bit of the result, and no two threads ever write the same place.
(``heads_dot`` writes the edges of its rows.) Kernels release the GIL.

Why not torch's sparse products: on the farthest block of a 3-hop batch (124 k x 453 k, 618 k edges, 128 features, one Zen 4
core) MKL needs 80-120 ms, ``torch.sparse.mm(reduce=...)`` 75, this loop 41; it also reads scales where they are instead of
building one value per edge, and writes into a wider matrix.
"""

# mypy: disable-error-code="misc"
from __future__ import annotations

import numba

_options = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}


@numba.njit(**_options)
def _factor(one, i, j, e, values, row_scale, col_scale):
    v = one
    if row_scale is not None:
        v *= row_scale[i]
    if col_scale is not None:
        v *= col_scale[j]
    if values is not None:
        v *= values[e]
    return v


@numba.njit(**_options)
def product(
    low,
    high,
    indptr,
    indices,
    values,
    row_scale,
    col_scale,
    x,
    root,
    root_from,
    root_scale,
    root_rows,
    out,
    width,
):
    """``out[i, :width] = root_scale[i] root[i] + sum_e row_scale[i] values[e] col_scale[j] x[j]`` over the edges e = (i, j).

    ``values``, ``row_scale``, ``col_scale`` and ``root_scale`` may be None (all ones), ``root`` too (zeros); rows from
    ``root_rows`` on have no root term. ``root`` is read from column ``root_from`` on: by a slice, since an index that is
    a sum may be negative for all the compiler knows, and what it must check in each turn it does not do in SIMD lanes.
    Four edges a turn, added one after the other, save three of four ways of ``out`` to memory and back.
    """
    one = x.dtype.type(1)
    for i in range(low, high):
        o = out[i]
        if root is not None and i < root_rows:
            r = root[i, root_from:]
            s = one if root_scale is None else root_scale[i]
            for k in range(width):
                o[k] = s * r[k]
        else:
            for k in range(width):
                o[k] = 0
        fours = (indptr[i + 1] - indptr[i]) // 4
        for e in range(indptr[i], indptr[i] + 4 * fours, 4):
            ja, jb, jc, jd = indices[e], indices[e + 1], indices[e + 2], indices[e + 3]
            va = _factor(one, i, ja, e, values, row_scale, col_scale)
            vb = _factor(one, i, jb, e + 1, values, row_scale, col_scale)
            vc = _factor(one, i, jc, e + 2, values, row_scale, col_scale)
            vd = _factor(one, i, jd, e + 3, values, row_scale, col_scale)
            ra, rb, rc, rd = x[ja], x[jb], x[jc], x[jd]
            for k in range(width):
                o[k] = o[k] + va * ra[k] + vb * rb[k] + vc * rc[k] + vd * rd[k]
        for e in range(indptr[i] + 4 * fours, indptr[i + 1]):
            j = indices[e]
            v = _factor(one, i, j, e, values, row_scale, col_scale)
            r = x[j]
            for k in range(width):
                o[k] += v * r[k]


@numba.njit(**_options)
def sparse_product(
    low,
    high,
    indptr,
    indices,
    values,
    row_scale,
    col_scale,
    ptr,
    index,
    value,
    root_to,
    root_scale,
    out,
):
    """:func:`product` of sparse rows: row j of x is ``value[ptr[j]:ptr[j + 1]]`` (None: ones) in the columns ``index[...]``.

    ``root_scale[i] x[i]`` is added from column ``root_to`` on. Each column sums in the order of :func:`product`, less its zeros.
    """
    one = out.dtype.type(1)
    for i in range(low, high):
        o = out[i]
        o[:] = 0
        r = out[i, root_to:]
        s = one if root_scale is None else root_scale[i]
        for f in range(ptr[i], ptr[i + 1]):
            r[index[f]] = s if value is None else s * value[f]
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            v = _factor(one, i, j, e, values, row_scale, col_scale)
            for f in range(ptr[j], ptr[j + 1]):
                o[index[f]] += v if value is None else v * value[f]


@numba.njit(**_options)
def transpose(ptr, index, value, ptr_t, row_t, value_t):
    """Sparse rows by columns: column c has the rows ``row_t[ptr_t[c]:ptr_t[c + 1]]``, ascending. A counting sort.

    ``value`` and ``value_t`` may be None (all ones).
    """
    ptr_t[:] = 0
    for e in range(len(index)):
        ptr_t[index[e] + 1] += 1
    for c in range(len(ptr_t) - 1):
        ptr_t[c + 1] += ptr_t[c]
    free = ptr_t[:-1].copy()
    for i in range(len(ptr) - 1):
        for e in range(ptr[i], ptr[i + 1]):
            at = free[index[e]]
            free[index[e]] = at + 1
            row_t[at] = i
            if value is not None:
                value_t[at] = value[e]


@numba.njit(**_options)
def maximum(low, high, indptr, indices, x, out):
    """``out[i] = max_e x[j]`` over the edges e = (i, j); zeros where there is none."""
    width = x.shape[1]
    for i in range(low, high):
        o = out[i]
        first, last = indptr[i], indptr[i + 1]
        if first == last:
            o[:] = 0
            continue
        o[:] = x[indices[first]]
        for e in range(first + 1, last):
            r = x[indices[e]]
            for k in range(width):
                o[k] = max(o[k], r[k])


@numba.njit(**_options)
def maximum_share(low, high, indptr, indices, x, top, grad, share):
    """``share[i] = grad[i] / (number of edges of i whose source attains the maximum)``, first half of the backward pass."""
    width = x.shape[1]
    for i in range(low, high):
        o = share[i]
        o[:] = 0
        t = top[i]
        for e in range(indptr[i], indptr[i + 1]):
            r = x[indices[e]]
            for k in range(width):
                o[k] += r[k] == t[k]
        g = grad[i]
        for k in range(width):
            o[k] = g[k] / o[k] if o[k] > 0 else 0


@numba.njit(**_options)
def maximum_back(low, high, indptr_t, indices_t, x, top, share, out):
    """``out[j] = sum_e share[i] [x[j] == top[i]]`` over the transposed edges e = (j, i), the second half."""
    width = x.shape[1]
    for j in range(low, high):
        o = out[j]
        o[:] = 0
        r = x[j]
        for e in range(indptr_t[j], indptr_t[j + 1]):
            t, s = top[indices_t[e]], share[indices_t[e]]
            for k in range(width):
                if r[k] == t[k]:
                    o[k] += s[k]


@numba.njit(**_options)
def heads_product(low, high, indptr, indices, edge, values, x, out):
    """``out[i, h] = sum_e values[edge[e], h] x[j, h]`` over the edges e = (i, j); ``edge`` None: the edges themselves.

    ``x`` is ``[cols, heads * width]``, ``values`` ``[edges, heads]``.
    """
    heads = values.shape[1]
    width = x.shape[1] // heads
    for i in range(low, high):
        o = out[i]
        o[:] = 0
        for e in range(indptr[i], indptr[i + 1]):
            r = x[indices[e]]
            v = values[e] if edge is None else values[edge[e]]
            for h in range(heads):
                s = v[h]
                for k in range(h * width, (h + 1) * width):
                    o[k] += s * r[k]


@numba.njit(
    **{**_options, "fastmath": {"contract", "reassoc"}}
)  # a dot product in SIMD lanes needs another order of sums
def heads_dot(low, high, indptr, indices, a, x, out):
    """``out[e, h] = <a[i, h], x[j, h]>`` for the edges e = (i, j) of the rows ``low..high-1``."""
    heads = out.shape[1]
    width = x.shape[1] // heads
    for i in range(low, high):
        r = a[i]
        for e in range(indptr[i], indptr[i + 1]):
            c = x[indices[e]]
            for h in range(heads):
                s = x.dtype.type(0)
                for k in range(h * width, (h + 1) * width):
                    s += r[k] * c[k]
                out[e, h] = s
