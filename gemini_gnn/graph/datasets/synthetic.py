"""Graphs made from a seed. All undirected (both directions stored), without self-loops or parallel edges.

Every generator draws ``nodes * degree / 2`` undirected edges; the few that repeat one another or join a node to itself are
dropped, so the mean degree comes out slightly below ``degree``. Everything is a pure function of the settings and the
seed: numpy's PCG64 streams, one per purpose, no Python loop over nodes or edges.
"""

from __future__ import annotations

import numpy as np

from gemini_gnn.config import DatasetConfig
from gemini_gnn.errors import ConfigError
from gemini_gnn.graph.datasets.assemble import RawGraph, mirrored
from gemini_gnn.graph.datasets.splits import random_split

NAMES = ("blocks", "sbm", "powerlaw", "erdos_renyi", "barabasi_albert")

# Of the edges of ``blocks``: half inside the class, 60 % of the others to other classes of the same super-group.
INSIDE_CLASS, INSIDE_GROUP = 0.5, 0.6
PARETO_SHAPE, PROPENSITY_CAP = 2.5, 50.0


def synthetic(config: DatasetConfig) -> RawGraph:
    """The graph of ``config.name`` with labels, features and a split (a tenth of the nodes to train on, a tenth to
    validate on, the others to test on).

    Features are ``signal`` times a unit vector of the class plus standard normal noise. In ``blocks`` and ``sbm`` edges
    prefer the own class, so structure and features each tell a part; in the others only features tell anything.

    Raises:
        ConfigError: sizes that no graph can have.
    """
    n, name = config.nodes, config.name
    for setting, fine, expected in (
        ("nodes", n >= 2, "at least 2"),
        ("degree", 0 < config.degree < n, f"more than 0 and less than dataset.nodes={n}"),
        ("classes", 1 <= config.classes <= n, f"1 to dataset.nodes={n}"),
        ("groups", 1 <= config.groups <= config.classes, f"1 to dataset.classes={config.classes}"),
        ("feature_dim", config.feature_dim >= 1, "at least 1"),
    ):
        if not fine:
            raise ConfigError(f"dataset.{setting}: expected {expected}; got {getattr(config, setting)}")
    labels, edges, noise = (np.random.default_rng([config.seed, stream]) for stream in (1, 2, 3))
    y = labels.integers(config.classes, size=n)
    pairs = round(n * config.degree / 2)
    if name == "blocks":
        propensity = np.minimum(edges.pareto(PARETO_SHAPE, n) + 1, PROPENSITY_CAP)
        source, target = block_pairs(y, y % config.groups, propensity, pairs, INSIDE_CLASS, INSIDE_GROUP, edges)
    elif name == "sbm":
        source, target = block_pairs(y, np.zeros(n, dtype=np.int64), np.ones(n), pairs, INSIDE_CLASS, 1.0, edges)
    elif name == "erdos_renyi":
        source, target = edges.integers(n, size=(2, pairs))
    elif name == "barabasi_albert":
        source, target = preferential_pairs(n, max(1, round(config.degree / 2)), edges)
    elif name == "powerlaw":
        source, target = configuration_pairs(powerlaw_degrees(n, config.degree, config.min_degree, edges), edges)
    else:
        raise AssertionError(name)
    different = source != target
    source, target, _ = mirrored(source[different], target[different], n, None)
    return RawGraph(
        name=name,
        num_nodes=n,
        source=source,
        target=target,
        x=class_features(y, config.classes, config.feature_dim, config.signal, noise),
        y=y,
        masks=random_split(np.ones(n, dtype=bool), (0.1, 0.1, 0.8), config.seed),
        symmetric=True,
        notes={"made": f"{name}, seed {config.seed}"},
    )


def class_features(y: np.ndarray, classes: int, width: int, signal: float, rng: np.random.Generator) -> np.ndarray:
    """float32 ``[nodes, width]``: ``signal`` times the unit mean of the node's class, plus N(0, 1)."""
    means = rng.standard_normal((classes, width))
    means *= signal / np.linalg.norm(means, axis=1, keepdims=True)
    x = rng.standard_normal((len(y), width), dtype=np.float32)
    x += means.astype(np.float32)[y]
    return x


def block_pairs(
    block: np.ndarray,
    group: np.ndarray,
    propensity: np.ndarray,
    pairs: int,
    inside_block: float,
    inside_group: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Edges of a nested degree-corrected block model (Karrer and Newman 2011, one level of nesting added).

    The first end of each edge is any node, the second one of the first's block (probability ``inside_block``), else of
    the other blocks of its group (``inside_group``), else of the other groups; nodes are drawn in proportion to
    ``propensity``. Where there is no other block or group, the edge goes to the nearest level that exists.
    ``group`` must be a function of ``block``.
    """
    # Sorted by group and block, blocks and groups are ranges of one cumulative sum of propensities: drawing from any of
    # them is a uniform number and a binary search, drawing from "range but not the part within" a jump over the part.
    order = np.lexsort((block, group))
    total = np.concatenate([[0.0], np.cumsum(propensity[order])])
    block_low, block_high = ranges(block[order], total)
    group_low, group_high = ranges(group[order], total)

    first = place(rng.random(pairs) * total[-1], total)
    bl, bh, gl, gh = block_low[first], block_high[first], group_low[first], group_high[first]
    others, outside = (gh - gl) - (bh - bl), total[-1] - (gh - gl)
    in_block = (rng.random(pairs) < inside_block) | ((others <= 0) & (outside <= 0))
    in_group = ((rng.random(pairs) < inside_group) | (outside <= 0)) & (others > 0)
    drawn = rng.random(pairs)
    within_group = gl + drawn * others
    beyond_group = drawn * outside
    at = np.where(
        in_block,
        bl + drawn * (bh - bl),
        np.where(
            in_group,
            within_group + np.where(within_group >= bl, bh - bl, 0.0),
            beyond_group + np.where(beyond_group >= gl, gh - gl, 0.0),
        ),
    )
    return order[first], order[place(at, total)]


def ranges(sorted_of: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end, in cumulative propensity, of the run of equal values that each entry of ``sorted_of`` lies in."""
    starts = np.flatnonzero(np.append(True, sorted_of[1:] != sorted_of[:-1]))
    stops = np.append(starts[1:], len(sorted_of))
    run = np.repeat(np.arange(len(starts)), stops - starts)
    return total[starts][run], total[stops][run]


def place(at: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Index of the interval ``total[i] <= at < total[i + 1]``."""
    return np.clip(np.searchsorted(total, at, side="right") - 1, 0, len(total) - 2)


def preferential_pairs(n: int, links: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Barabasi and Albert (1999): each new node links to ``links`` earlier ones in proportion to their degree.

    Batagelj and Brandes (2005): the list of all edge ends so far *is* the distribution by degree, so a link copies a
    uniformly chosen earlier entry. Links that copy a copy are resolved at once, by following the pointers
    until they reach an entry that is a new node's own: each round halves the rest.
    """
    edge = np.arange(n * links)
    pointer = (rng.random(len(edge)) * (2 * edge + 1)).astype(np.int64)  # entry 2e: the new node; 2e + 1: its target
    target = pointer.copy()
    while (copied := np.flatnonzero(target % 2 == 1)).size:
        target[copied] = pointer[target[copied] // 2]
    return edge // links, target // 2 // links


def powerlaw_degrees(n: int, mean: float, least: float, rng: np.random.Generator) -> np.ndarray:
    """int64 ``[n]`` degrees from a Pareto distribution with minimum ``least`` and the given mean, cut at n / 10.

    The shape follows from the two: an uncut Pareto has mean ``least * a / (a - 1)``. The cut takes away some of a heavy
    tail, so the shape is found by bisection on the mean of the cut distribution.

    Raises:
        ConfigError: the mean is not above the minimum, or beyond what the cut allows.
    """
    most = max(n / 10, least)

    def cut_mean(shape: float) -> float:
        # integral of P(degree > d) from 0 to the cut
        if abs(shape - 1) < 1e-9:
            return least * (1 + np.log(most / least))
        return least * (1 + (1 - (most / least) ** (1 - shape)) / (shape - 1))

    low, high = 0.05, 200.0  # heavy tail, large mean .. light tail, mean about `least`
    if not (0 < least < mean) or not cut_mean(high) < mean < cut_mean(low):
        raise ConfigError(
            f"dataset.min_degree: expected more than 0 and less than dataset.degree={mean} (with {n} nodes); got {least}"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cut_mean(middle) > mean else (low, middle)
    degrees = np.minimum(least * (1 - rng.random(n)) ** (-1 / low), most)
    # Randomised rounding keeps the mean; plain floor would lose half an edge per node.
    return np.floor(degrees + rng.random(n)).astype(np.int64)


def configuration_pairs(degrees: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The configuration model: every node has ``degrees[node]`` edge ends, and ends are joined at random."""
    ends = np.repeat(np.arange(len(degrees), dtype=np.int64), degrees)
    rng.shuffle(ends)
    half = len(ends) // 2
    return ends[:half], ends[half : 2 * half]
