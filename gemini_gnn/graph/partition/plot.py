"""A small partitioned graph as a picture: parts as islands of colour, cut edges as bridges between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemini_gnn.errors import PartitionError
from gemini_gnn.graph.partition.folder import PartitionedGraph

MAX_NODES = 5_000
MAX_LINES = 60_000  # edges drawn; more only make the picture black
CUT_COLOR = "#d62728"


def plot_partitioned(pg: PartitionedGraph, file: str | Path, seed: int = 0) -> Path:
    """Draw ``pg`` as PNG: node colour = part, node area grows with the degree, cut edges in red.

    Every part is laid out by springs on its own inner edges, spread over a disc whose area is proportional to its
    nodes, and turned so that its cut edges become short.

    Raises:
        PartitionError: more than ``MAX_NODES`` nodes, or the file cannot be written.
    """
    if pg.num_nodes > MAX_NODES:
        raise PartitionError(
            f"partition.plot: expected at most {MAX_NODES} nodes; {pg.meta.graph} has {pg.num_nodes}; "
            "leave partition.plot off, the printed quality says the same in numbers"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    part = pg.owner(np.arange(pg.num_nodes))
    pairs = node_pairs(pg)
    place = layout(pairs, part, pg.parts, seed)
    cut = part[pairs[:, 0]] != part[pairs[:, 1]]
    colors = part_colors(pg.parts)

    figure = Figure(figsize=(11, 11), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    axes.axis("off")
    rng = np.random.default_rng(seed)

    def draw(chosen: np.ndarray, color, strength: float, order: int) -> None:
        lines = np.flatnonzero(chosen)
        if len(lines) > MAX_LINES // 2:
            lines = rng.choice(lines, MAX_LINES // 2, replace=False)
        ink = float(np.clip(strength * (1_000 / max(len(lines), 1)) ** 0.7, 0.03, 0.7))
        of_each = color[part[pairs[lines, 0]]] if isinstance(color, np.ndarray) else color
        axes.add_collection(
            LineCollection(list(place[pairs[lines]]), colors=of_each, alpha=ink, linewidths=0.6, zorder=order)
        )

    draw(~cut, colors * 0.8, 0.5, 1)
    draw(cut, CUT_COLOR, 0.5, 2)
    degree = np.bincount(pairs.ravel(), minlength=pg.num_nodes)
    base = np.clip(20_000 / pg.num_nodes, 5, 120)
    area = base * np.clip(np.sqrt((1 + degree) / (1 + degree.mean())), 0.5, 3)
    axes.scatter(place[:, 0], place[:, 1], s=area, c=colors[part], edgecolors="white", linewidths=0.3, zorder=3)
    axes.autoscale_view()
    quality = pg.meta.quality
    axes.set_title(
        f"{pg.meta.graph}: {pg.num_nodes:,} nodes, {pg.num_edges:,} edges, {pg.parts} parts by {pg.meta.method}; "
        f"{quality.edge_cut:.1%} of the edges cut",
        fontsize=13,
    )
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colors[p], label=f"part {p}: {quality.nodes[p]:,} nodes")
        for p in range(min(pg.parts, 12))
    ]
    if pg.parts > 12:
        handles.append(Line2D([], [], linestyle="", label=f"... {pg.parts - 12} more"))
    handles.append(Line2D([], [], color=CUT_COLOR, label=f"cut edges: {np.count_nonzero(cut):,} node pairs"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), frameon=False)
    file = Path(file)
    try:
        canvas.print_png(str(file))
    except OSError as error:
        raise PartitionError(f"cannot write {file}: {error.strerror or error}") from error
    return file


def node_pairs(pg: PartitionedGraph) -> np.ndarray:
    """Connected pairs of nodes, each once, without self-loops: int64 ``[pairs, 2]``."""
    n = pg.num_nodes
    target = np.repeat(np.arange(n), np.diff(pg.colptr))
    low, high = np.minimum(pg.row, target).astype(np.int64), np.maximum(pg.row, target)
    keys = np.unique(low[low != high] * n + high[low != high])
    return np.stack(np.divmod(keys, n), axis=1)


def part_colors(parts: int) -> np.ndarray:
    """float ``[parts, 3]``: distinct colours, red left to the cut edges."""
    from matplotlib import colormaps

    named = np.array(colormaps["tab10"]([0, 2, 1, 4, 9, 5, 6, 8]))[:, :3]
    if parts <= len(named):
        return named[:parts]
    hues = np.linspace(0.08, 0.92, parts, endpoint=False)
    return np.array(colormaps["hsv"](hues))[:, :3] * np.array([[0.85], [0.6]])[np.arange(parts) % 2]


def layout(pairs: np.ndarray, part: np.ndarray, parts: int, seed: int = 0) -> np.ndarray:
    """Positions float64 ``[nodes, 2]``; a pure function of its arguments."""
    n = len(part)
    sizes = np.bincount(part, minlength=parts)
    radius = np.sqrt(sizes / n)
    centers = island_centers(pairs, part, radius, seed)
    place = np.zeros((n, 2))
    inner = part[pairs[:, 0]] == part[pairs[:, 1]]
    for p in range(parts):
        nodes = np.flatnonzero(part == p)
        within = np.searchsorted(nodes, pairs[inner & (part[pairs[:, 0]] == p)])
        place[nodes] = spread(springs(within, len(nodes), seed)) * radius[p]
    for _ in range(3):  # each island turns towards where its cut edges lead
        for p in range(parts):
            nodes = part == p
            crossing = pairs[nodes[pairs[:, 0]] != nodes[pairs[:, 1]]]
            swap = ~nodes[crossing[:, 0]]
            crossing[swap] = crossing[swap][:, ::-1]
            there = place[crossing[:, 1]] + centers[part[crossing[:, 1]]] - centers[p]
            place[nodes] = turned(place[nodes], place[crossing[:, 0]], there)
    return place + centers[part]


def island_centers(pairs: np.ndarray, part: np.ndarray, radius: np.ndarray, seed: int) -> np.ndarray:
    """Centers of discs on a circle, neighbors on it sharing many cut edges: float64 ``[parts, 2]``."""
    parts = len(radius)
    if parts == 1:
        return np.zeros((1, 2))
    between = np.zeros((parts, parts))
    np.add.at(between, (part[pairs[:, 0]], part[pairs[:, 1]]), 1)
    between += between.T
    order = [int(np.argmax(between.sum(axis=1)))]
    while len(order) < parts:  # the next one is the part most tied to the last
        ties = between[order[-1]].copy()
        ties[order] = -1
        order.append(int(np.argmax(ties)))
    width = radius[order] * 1.15
    ring = 2 * width.sum() / (2 * np.pi) if parts > 2 else width.sum() / 2
    at = 2 * np.pi * (np.cumsum(2 * width) - width) / (2 * width.sum())
    centers = np.zeros((parts, 2))
    centers[order] = max(ring, 1.2 * float(radius.max())) * np.stack([np.cos(at), np.sin(at)], axis=1)
    return centers


def springs(pairs: np.ndarray, n: int, seed: int, steps: int = 60) -> np.ndarray:
    """Force-directed layout (Fruchterman & Reingold, Software: Practice and Experience 21, 1991): float ``[n, 2]``.

    All pairs repel as 1/distance, connected pairs attract as distance^2; moves are capped by a falling temperature. The
    sum over all pairs is two matrix products: 5,000 nodes take seconds.
    """
    at = np.random.default_rng(seed).random((n, 2), dtype=np.float32)
    k = 2 / np.sqrt(n)
    for temperature in np.linspace(0.1, 0.002, steps, dtype=np.float32):
        square = (at**2).sum(axis=1)
        apart = square[:, None] + square[None] - 2 * (at @ at.T)
        push = k * k / np.maximum(apart, 1e-3 * k * k)
        move = at * push.sum(axis=1, keepdims=True) - push @ at
        along = at[pairs[:, 1]] - at[pairs[:, 0]]
        pull = along * (np.hypot(*along.T) / k)[:, None]
        for axis in range(2):
            move[:, axis] += np.bincount(pairs[:, 0], pull[:, axis], n) - np.bincount(pairs[:, 1], pull[:, axis], n)
        length = np.maximum(np.hypot(*move.T), 1e-6)[:, None]
        at = (at + move / length * np.minimum(length, temperature)).astype(np.float32)
    return at


def spread(points: np.ndarray) -> np.ndarray:
    """Points moved along their rays so that they fill the unit disc evenly; directions are kept."""
    centered = points - np.median(points, axis=0)
    distance = np.hypot(*centered.T)
    rank = np.argsort(np.argsort(distance, kind="stable"), kind="stable")
    even = np.sqrt((rank + 0.5) / len(points))
    return centered * (even / np.maximum(distance, 1e-12))[:, None]


def turned(points: np.ndarray, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """``points`` rotated (and mirrored) about the origin by what brings ``here`` closest to ``there``.

    The orthogonal Procrustes problem (Schönemann, Psychometrika 31, 1966): the polar factor of their covariance.
    """
    if len(here) == 0:
        return points
    u, _, v = np.linalg.svd(here.T @ there)
    return points @ (u @ v)
