"""The compiled half of sampling. Only numba in here: arrays in, arrays filled, no decisions about what a batch is.

Every kernel releases the GIL and none starts threads: batches are prepared on one Python thread, and a numba thread pool
would not survive the fork a recovering trainer is born by. Arguments are not checked here; callers do.

All kernels live in this one file on purpose: numba's on-disk cache looks at the file of the function it compiles, not at
those of the functions it calls, so a helper in another file could change without its callers being compiled again.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def _compiled(function: Any) -> Any:
    """njit with the cache on disk: beside this file, else in the user's cache folder, else none at all."""
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # "no locator available": neither place is writable; compile once per process instead
        return njit(nogil=True, error_model="numpy")(function)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_S6, _S11, _LOW6, _LOW32 = np.uint64(6), np.uint64(11), np.uint64(63), np.uint64(0xFFFFFFFF)
_ZERO, _ONE = np.uint64(0), np.uint64(1)


@_compiled
def splitmix64(x):
    """Twin of ``hashing.splitmix64`` for one uint64."""
    z = x + _GOLDEN
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@_compiled
def _below(key, counter, bound):
    """Draw number ``counter`` of stream ``key``, an integer in ``[0, bound)``: floor(hash * bound / 2^64), bound < 2^32."""
    h = splitmix64(key + np.uint64(counter) * _GOLDEN)
    n = np.uint64(bound)
    return np.int64(((h >> _S32) * n + (((h & _LOW32) * n) >> _S32)) >> _S32)


@intrinsic
def _trailing_zeros(typing_context, value):
    """Index of the lowest set bit of a non-zero uint64 (one instruction)."""

    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


@intrinsic
def _prefetch(typing_context, array, index):
    """Ask for the cache line of ``array[index]`` and go on. Cache misses are most of what sampling costs: this takes a
    sixth off a batch of a graph of 1 M nodes. It never faults and changes no result."""

    def codegen(context, builder, signature, arguments):
        array_struct = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte = ir.IntType(8).as_pointer()
        address = builder.bitcast(builder.gep(array_struct.data, [arguments[1]]), byte)
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        to_read, keep_close, data = (ir.Constant(word, n) for n in (0, 3, 1))
        builder.call(function, [address, to_read, keep_close, data])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


_AHEAD = 16  # elements between a prefetch and its use: some hundred nanoseconds of the work in these loops


@_compiled
def look_up(colptr, original, nodes, base, fanout, indptr, first, degree, key):
    """All random reads of the nodes in one loop without branches, so that their cache misses overlap.

    Args:
        colptr: int64 ``[nodes + 1]``; original: integer, original id per column of ``colptr``.
        nodes: int64, columns of ``colptr``; base: uint64, the stream of this hop.
        indptr: int64 ``[len(nodes) + 1]``, filled with where the drawn in-edges of each node begin.
        first, degree: int64, filled with where its in-edges begin in the graph, and how many there are.
        key: uint64, filled with the node's own stream.
    """
    indptr[0] = 0
    last = len(nodes) - 1
    for i in range(len(nodes)):
        ahead = nodes[min(i + _AHEAD, last)]
        _prefetch(colptr, ahead)
        _prefetch(original, ahead)
        v = nodes[i]
        first[i] = colptr[v]
        degree[i] = colptr[v + 1] - colptr[v]
        indptr[i + 1] = indptr[i] + (min(degree[i], fanout) if fanout >= 0 else degree[i])
        key[i] = splitmix64(base ^ np.uint64(original[v]))


@_compiled
def in_degrees(colptr, nodes, out):
    for i in range(len(nodes)):
        v = nodes[i]
        out[i] = colptr[v + 1] - colptr[v]


@_compiled
def draw_uniform(indptr, firsts, degrees, keys, positions, picks, bitmap):
    """Draw ``min(fanout, degree)`` in-edges of each node without replacement, each subset equally likely.

    Floyd's algorithm (Bentley, Floyd: A sample of brilliance, CACM 1987): for j = degree-k .. degree-1 pick t in 0..j;
    take t, or j when t is already taken. Three ways to remember what is taken, same result: a word of bits, which also
    yields the draws in ascending order; several words; or the sorted draws themselves where those would be many (hubs).

    Args:
        indptr, firsts, degrees, keys: from :func:`look_up`.
        positions: int64 ``[edges]``, filled with edge positions, ascending per node.
        picks: int64, at least as long as the largest draw (the hashes in a loop of their own are done by vector units).
        bitmap: uint64, all zero and left so; at least ``bitmap_words(fanout, ...)`` long.
    """
    for i in range(len(firsts)):
        first, degree, key, begin = firsts[i], degrees[i], keys[i], indptr[i]
        k = indptr[i + 1] - begin
        if k == degree:
            for j in range(k):
                positions[begin + j] = first + j
            continue
        for step in range(k):
            picks[step] = _below(key, step, degree - k + step + 1)
        words = (degree + 63) >> 6
        if words == 1:
            taken = _ZERO
            for step in range(k):
                bit = _ONE << np.uint64(picks[step])
                taken |= (_ONE << np.uint64(degree - k + step)) if taken & bit else bit
            e = begin
            while taken != _ZERO:
                positions[e] = first + np.int64(_trailing_zeros(taken))
                taken &= taken - _ONE
                e += 1
        elif words * 8 <= k * k:
            for step in range(k):
                j = degree - k + step
                t = picks[step]
                word, bit = t >> 6, _ONE << (np.uint64(t) & _LOW6)
                if bitmap[word] & bit:
                    word, bit = j >> 6, _ONE << (np.uint64(j) & _LOW6)
                bitmap[word] |= bit
            e = begin
            for word in range(words):
                bits = bitmap[word]
                bitmap[word] = _ZERO
                while bits != _ZERO:
                    positions[e] = first + (word << 6) + np.int64(_trailing_zeros(bits))
                    bits &= bits - _ONE
                    e += 1
        else:
            for step in range(k):
                j = degree - k + step
                t = first + picks[step]
                low, high = begin, begin + step  # binary search: k may be hundreds here
                while low < high:
                    middle = (low + high) >> 1
                    if positions[middle] < t:
                        low = middle + 1
                    else:
                        high = middle
                if low < begin + step and positions[low] == t:
                    positions[begin + step] = first + j
                else:
                    for e in range(begin + step, low, -1):
                        positions[e] = positions[e - 1]
                    positions[low] = t


def bitmap_words(fanout: int, num_edges: int) -> int:
    """Length of the scratch :func:`draw_uniform` needs: it uses a bitmap only up to ``fanout^2 / 8`` words."""
    return 1 if fanout < 0 else min(fanout * fanout // 8, num_edges // 64) + 1


@_compiled
def draw_weighted(indptr, firsts, degrees, keys, weight, positions, heap, corrected):
    """Draw without replacement, the next edge always with probability proportional to its weight.

    Efraimidis, Spirakis: Weighted random sampling with a reservoir (IPL 2006), in its exponential form: each edge gets
    the key -log(u) / weight, the k smallest keys win. Time is the degree of the node, not the fanout.

    Heavy edges come more often than others and would count twice in a sum of weighted messages. Given all other keys, an
    edge is drawn if its own is below t, the smallest key that lost: with probability p = 1 - exp(-weight t). Divided by
    p, the sum over the drawn edges has the sum over all of them as its mean (Cohen, Kaplan: Summarizing data using
    bottom-k sketches, PODC 2007).

    Args:
        weight: float32 or float64 ``[edges]``, more than 0; heap: float64, at least as long as the largest draw.
        corrected: float32 ``[drawn edges]``, filled with weight / p * drawn / degree: what makes
            ``degree / drawn * sum(corrected * message)`` right, as ``degree / drawn * sum(weight * message)`` is for a
            uniform draw.
        The others as in :func:`draw_uniform`.
    """
    for i in range(len(firsts)):
        first, degree, key, begin = firsts[i], degrees[i], keys[i], indptr[i]
        k = indptr[i + 1] - begin
        if k == degree:
            for j in range(k):
                positions[begin + j] = first + j
                corrected[begin + j] = weight[first + j]
            continue
        smallest_lost = math.inf
        for j in range(degree):
            h = splitmix64(key + np.uint64(j) * _GOLDEN)
            u = (np.float64(h >> _S11) + 0.5) * (1.0 / 9007199254740992.0)
            cost = -math.log(u) / np.float64(weight[first + j])
            # A max-heap of the k cheapest so far: heap[] and positions[begin:] move together.
            if j < k:
                hole = j
                while hole > 0 and heap[(hole - 1) >> 1] < cost:
                    parent = (hole - 1) >> 1
                    heap[hole] = heap[parent]
                    positions[begin + hole] = positions[begin + parent]
                    hole = parent
            elif cost < heap[0]:
                smallest_lost = min(smallest_lost, heap[0])
                hole = 0
                while True:
                    child = 2 * hole + 1
                    if child >= k:
                        break
                    if child + 1 < k and heap[child + 1] > heap[child]:
                        child += 1
                    if heap[child] <= cost:
                        break
                    heap[hole] = heap[child]
                    positions[begin + hole] = positions[begin + child]
                    hole = child
            else:
                smallest_lost = min(smallest_lost, cost)
                continue
            heap[hole] = cost
            positions[begin + hole] = first + j
        positions[begin : begin + k].sort()
        for e in range(begin, begin + k):
            w = np.float64(weight[positions[e]])
            corrected[e] = w / -math.expm1(-w * smallest_lost) * k / degree


@_compiled
def take(values, positions, out):
    """``out[:] = values[positions]``; values may be a read-only map of any number type."""
    last = len(positions) - 1
    for e in range(len(positions)):
        _prefetch(values, positions[min(e + 3 * _AHEAD, last)])
        out[e] = values[positions[e]]


@_compiled
def place_seeds(seeds, slot, nodes):
    """Enter the seeds into ``nodes``; ``slot[v]`` becomes 1 + the local id of v. A repeated seed keeps its own row."""
    for i in range(len(seeds)):
        nodes[i] = seeds[i]
        if slot[seeds[i]] == 0:
            slot[seeds[i]] = i + 1


@_compiled
def relabel(neighbors, slot, nodes, known, indices):
    """Local ids of ``neighbors`` into ``indices``; new nodes join ``nodes`` in order of appearance.

    Args:
        slot: int32 by node id: 0 = not in this batch yet, else 1 + local id. nodes: int64, the first ``known`` are
        taken and ``len(neighbors)`` more fit.

    Returns:
        The number of nodes known now.
    """
    last = len(neighbors) - 1
    for e in range(len(neighbors)):
        _prefetch(slot, neighbors[min(e + _AHEAD, last)])
        v = neighbors[e]
        at = slot[v]
        if at == 0:
            nodes[known] = v
            known += 1
            at = known
            slot[v] = at
        indices[e] = at - 1
    return known


@_compiled
def forget(nodes, slot):
    """Make ``slot`` all zero again, in the time of the batch and not of the graph."""
    for i in range(len(nodes)):
        slot[nodes[i]] = 0


@_compiled
def transpose(indptr, indices, indptr_t, indices_t, edge_t):
    """Counting sort of the edges by source; stable, so destinations ascend.

    Destination and position travel together in one word, which is cut in two by a pass in order: storing each at its own
    scattered place took 1.25 to 1.5 times as long.

    Args:
        indptr_t: int64 ``[num_src + 2]``; on return its first ``num_src + 1`` entries are the row pointer.
    """
    indptr_t[:] = 0
    for e in range(len(indices)):
        indptr_t[indices[e] + 2] += 1
    for s in range(2, len(indptr_t)):
        indptr_t[s] += indptr_t[s - 1]
    for d in range(len(indptr) - 1):  # indptr_t[s + 1] is the cursor of s: it ends where s + 1 begins
        for e in range(indptr[d], indptr[d + 1]):
            s = indices[e]
            j = indptr_t[s + 1]
            indptr_t[s + 1] = j + 1
            edge_t[j] = (d << 32) | e  # fewer than 2^31 nodes in a batch, as in `slot`, and 2^32 edges
    for j in range(len(indices)):
        both = edge_t[j]
        indices_t[j] = both >> 32
        edge_t[j] = both & 0xFFFFFFFF


@functools.cache
def warm_up(weighted: bool = False) -> None:
    """Compile every kernel for the types in use, or load it from disk: 2 s the first time ever, 0.1 s after that."""
    indptr = np.zeros(1, dtype=np.int64)
    none, none32 = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
    colptr, row, row32, weight = (
        np.zeros(1, np.int64),
        np.empty(0, np.int64),
        np.empty(0, np.int32),
        np.empty(0, np.float32),
    )
    for array in (colptr, row, row32, weight):
        array.flags.writeable = False
    base, keys, words, heap = np.uint64(0), np.empty(0, np.uint64), np.zeros(1, np.uint64), np.empty(0)
    look_up(colptr, row, none, base, 1, indptr, none, none, keys)
    in_degrees(colptr, none, none)
    draw_uniform(indptr, none, none, keys, none, none, words)
    take(row, none, none)
    take(row32, none, none)
    if weighted:
        draw_weighted(indptr, none, none, keys, weight, none, heap, np.empty(0, dtype=np.float32))
        take(weight, none, np.empty(0, dtype=np.float32))
    place_seeds(none, none32, none)
    relabel(none, none32, none, 0, none)
    forget(none, none32)
    transpose(indptr, none, np.zeros(2, dtype=np.int64), none, none)
