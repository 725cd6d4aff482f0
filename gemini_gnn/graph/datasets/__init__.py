"""Data sets: from a :class:`DatasetConfig`, a file, or an object in Python to a :class:`Graph`.

    load_dataset(config)            what ``dataset=...`` names: published, synthetic, an edge list, a folder of .npy
    fingerprint(config)             which graph that is, without loading it
    load_edge_list(path)            the edges of a file and nothing else
    from_pyg, from_networkx, from_folder

One module per source makes a ``RawGraph``; ``assemble`` is the only way from there to a ``Graph``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace

from gemini_gnn.config import DatasetConfig
from gemini_gnn.errors import ConfigError
from gemini_gnn.graph.datasets.assemble import RawGraph, assemble
from gemini_gnn.graph.datasets.edge_list import EdgeList, load_edge_list, read_edge_list
from gemini_gnn.graph.datasets.files import cache_folder, digest_of_files, read_folder, root_folder, user_file
from gemini_gnn.graph.datasets.in_memory import from_folder, from_networkx, from_pyg
from gemini_gnn.graph.datasets.synthetic import NAMES as SYNTHETIC
from gemini_gnn.graph.datasets.synthetic import synthetic
from gemini_gnn.graph.datasets.third_party import PUBLISHED, imported, published_graph
from gemini_gnn.graph.graph import Graph

__all__ = [
    "EdgeList",
    "cache_folder",
    "fingerprint",
    "from_folder",
    "from_networkx",
    "from_pyg",
    "load_dataset",
    "load_edge_list",
    "root_folder",
]

FORMAT_VERSION = 1  # raise it when the same settings would give another graph

# The settings each source reads beside name, root, cache, normalize, undirected, split and seed.
FILES = ("path", "features", "labels", "splits")
USED = {
    "edge_list": {*FILES, "ids", "first_id", "skip_lines", "featureless"},
    "folder": {"path", "featureless"},
    "published": {"featureless"},
    "synthetic": {"nodes", "degree", "classes", "groups", "feature_dim", "signal"},
}
ALWAYS_USED = {"name", "root", "cache", "normalize", "undirected", "split", "seed"}


def load_dataset(
    config: DatasetConfig,
    progress: Callable[[str], None] | None = None,
    *,
    require_labels: bool = True,
    layout: str = "auto",
) -> Graph:
    """The graph that ``config`` names: validated, in canonical order, with its features normalised and one split.

    Args:
        progress: told a line now and then while something takes long.
        require_labels: False accepts a graph without labels, to partition or to sample it: ``y`` is -1, the masks empty.
        layout: form of the features, the setting ``features.layout``. It is no part of the fingerprint.

    Raises:
        ConfigError: unknown name, a setting this data set does not use, a split it does not have.
        DataError: files absent or malformed: which, where, what was expected.
    """
    config = checked(config)
    return assemble(
        read(config, progress),
        undirected=config.undirected,
        normalize=config.normalize,
        split=config.split,
        seed=config.seed,
        featureless=config.featureless,
        layout=layout,
        require_labels=require_labels,
    )


def read(config: DatasetConfig, progress: Callable[[str], None] | None) -> RawGraph:
    kind = kind_of(config)
    if kind == "published":
        return published_graph(config, progress)
    if kind == "synthetic":
        return synthetic(config)
    path = user_file(config, "path")
    if path is None:
        raise ConfigError(f"dataset.path: expected the {kind.replace('_', ' ')} to read; got none")
    if kind == "folder":
        return read_folder(path, path.resolve().name)
    return read_edge_list(
        path,
        config.ids,
        config.first_id,
        config.skip_lines,
        features=user_file(config, "features"),
        labels=user_file(config, "labels"),
        splits=user_file(config, "splits"),
    )


def fingerprint(config: DatasetConfig) -> str:
    """16 hex digits that change when the graph does: settings and contents of files, not where they lie.

    Takes milliseconds and loads nothing, with one exception: a published data set that was never imported is imported
    first (perhaps downloaded), because without its files there is nothing to take a fingerprint of.

    Raises:
        ConfigError, DataError: as :func:`load_dataset`, where that can be told without loading.
    """
    import xxhash

    config = checked(config)
    kind = kind_of(config)
    used = (USED[kind] | ALWAYS_USED | ({"min_degree"} if config.name == "powerlaw" else set())) - {
        "root",
        "cache",
        *FILES,
    }
    facts = {name: getattr(config, name) for name in sorted(used)}
    files: dict[str, str] = {}
    if kind == "published":
        files["imported"] = imported(config).name.rpartition("-")[2]
    for setting in FILES:
        if (path := user_file(config, setting)) is not None:
            files[setting] = digest_of_files(sorted(path.glob("*.np[yz]")) if path.is_dir() else [path])
    text = json.dumps([FORMAT_VERSION, facts, files], sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())


def kind_of(config: DatasetConfig) -> str:
    """Which module reads it: "published", "synthetic", "edge_list" or "folder"."""
    if config.name in PUBLISHED:
        return "published"
    return "synthetic" if config.name in SYNTHETIC else config.name


def used_settings(config: DatasetConfig) -> set[str]:
    return USED[kind_of(config)] | ALWAYS_USED | ({"min_degree"} if config.name == "powerlaw" else set())


def checked(config: DatasetConfig) -> DatasetConfig:
    """``config`` with the usual spelling of its name, if it contradicts neither itself nor its data set.

    Raises:
        ConfigError: see :func:`load_dataset`.
    """
    known = [*SYNTHETIC, *PUBLISHED, "edge_list", "folder"]
    spelled = {name.lower().replace("-", "_"): name for name in known}
    name = spelled.get(config.name.lower().replace("-", "_"))
    if config.name == "partitioned":
        raise ConfigError(
            "dataset=partitioned: expected a graph that can be read by itself; a partitioned one lies in partition.folder: "
            "`launch/partition.py dataset=partitioned partition.folder=FOLDER` shows it, `launch/train.py` with the same "
            "settings trains on it"
        )
    if name is None:
        import difflib

        close = difflib.get_close_matches(config.name.lower(), list(spelled), n=1)
        hint = f" (did you mean {spelled[close[0]]}?)" if close else ""
        raise ConfigError(
            f"dataset.name: expected one of {', '.join(known)}; got {config.name!r}{hint}. A NetworkX graph or PyG Data "
            "is given from Python: gemini_gnn.partition(data, ...)"
        )
    config = replace(config, name=name)
    used = used_settings(config)
    for field in fields(config):
        if field.name not in used and getattr(config, field.name) != field.default:
            raise ConfigError(
                f"dataset.{field.name}: expected its default {field.default!r}, because dataset.name={name} does not use "
                f"it; got {getattr(config, field.name)!r}"
            )
    if config.splits is not None and config.split not in ("default", "public"):
        raise ConfigError(
            f"dataset.split: expected default, because dataset.splits={config.splits} says it already; got {config.split}"
        )
    return config
