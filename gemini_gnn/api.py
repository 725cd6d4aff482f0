"""gemini_gnn from Python: partition a graph, train on it, get the model and its predictions back."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemini_gnn.compose import compose, groups
from gemini_gnn.config import Config, DatasetConfig, ModelConfig, from_mapping, to_mapping
from gemini_gnn.errors import ConfigError, DataError, RunDirError
from gemini_gnn.graph import datasets
from gemini_gnn.graph.graph import Graph
from gemini_gnn.graph.partition.assign import partition_nodes
from gemini_gnn.graph.partition.folder import PartitionedGraph
from gemini_gnn.graph.partition.write import write_partitioned
from gemini_gnn.graph.sparse import laid_out
from gemini_gnn.observe.run_directory import read_config

READING = (
    "undirected",
    "normalize",
    "split",
    "seed",
    "featureless",
)  # settings of `dataset` that apply to data from Python


def as_graph(data: Any, name: str = "graph", **reading: Any) -> Graph:
    """A :class:`Graph` from a PyG ``Data``, a NetworkX graph, a folder of ``.npy`` files, a PartitionedGraph or a Graph.

    Args:
        reading: ``undirected, normalize, split, seed, featureless`` as in the settings ``dataset.*``; ``layout`` as in
            ``features.layout``; and ``require_labels=False`` for a graph that is not to be trained on. A graph that was
            read already keeps its form, unless ``layout`` is "dense" or "sparse".

    Raises:
        DataError: another type, or data that is malformed. ConfigError: ``reading`` that does not apply.
    """
    if unknown := reading.keys() - {*READING, "layout", "require_labels"}:
        raise ConfigError(
            f"dataset.{min(unknown)}: expected only {', '.join(READING)} for data given from Python; leave it out"
        )
    if isinstance(data, (Graph, PartitionedGraph)):
        if given := reading.keys() & {*READING}:
            raise ConfigError(
                f"dataset.{min(given)}: does not apply to a graph that was read already; leave it out, or give the "
                "data it was made from"
            )
        graph = data if isinstance(data, Graph) else data.as_graph()
        layout = reading.get("layout", "auto")
        return graph if layout == "auto" else replace(graph, x=laid_out(graph.x, layout))
    if isinstance(data, (str, Path)):
        return datasets.from_folder(Path(data), **reading)
    pyg = sys.modules.get("torch_geometric.data")  # slow to import: where nobody did, `data` is not of it
    if pyg is not None and isinstance(data, pyg.Dataset):
        raise DataError(
            f"expected one graph; got the PyG data set {type(data).__name__} of {len(data)}. Give one of its graphs: "
            "dataset[0]"
        )
    if hasattr(data, "edge_index"):
        return datasets.from_pyg(data, name=name, **reading)
    if hasattr(data, "adjacency"):
        if "split" in reading:  # there the name of a node attribute
            reading["split_by"] = reading.pop("split")
        return datasets.from_networkx(data, name=name, **reading)
    raise DataError(
        f"expected a PyG Data, a NetworkX graph, a folder of .npy files or a gemini_gnn Graph; got {type(data).__name__}"
    )


def partition(
    data: Any,
    folder: str | Path,
    *,
    parts: int,
    method: str = "metis",
    seed: int = 0,
    balance_edges: bool = False,
    **reading: Any,
) -> PartitionedGraph:
    """Partition a graph and write it to ``folder`` (which must not exist yet).

    Train on it with :func:`train`, or on several ranks with
    ``deepspeed --num_accelerators PARTS launch/train.py dataset=partitioned partition.folder=FOLDER``.

    Args:
        data: what :func:`as_graph` takes.
        parts: one per rank.
        method: "metis" | "hash".
        reading: as in :func:`as_graph`, but for ``seed``, which is the partition's here. Labels may be missing.

    Raises:
        DataError, PartitionError: bad data; more parts than nodes; the folder exists.
    """
    graph = as_graph(data, **{"require_labels": False, **reading})
    assignment = partition_nodes(graph, method, parts, seed, balance_edges)
    settings = {"seed": seed, "balance_edges": balance_edges}
    return write_partitioned(
        graph, assignment, Path(folder), method=method, settings=settings, fingerprint="from-python"
    )


def train(data: Any, run_dir: str | Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Train in this process with one rank, and return what ``result.json`` holds.

    Args:
        data: what :func:`as_graph` takes, or a :class:`PartitionedGraph` of one part.
        run_dir: a folder for everything the run leaves; the partitioned graph goes there too.
        settings: as on the command line, e.g. ``{"model": "gat", "training.epochs": 5, "sampling.fanouts": [10, 5]}``; of
            ``dataset.*`` what :func:`as_graph` takes. Without any about snapshots none are taken.

    Raises:
        GeminiError: settings or data that cannot be trained on.
    """
    from gemini_gnn.training import job

    run_dir = Path(run_dir).absolute()
    if (run_dir / "result.json").exists():
        raise RunDirError(
            f"{run_dir} holds a finished run; give another run_dir, read it with gemini_gnn.load, or remove the folder to "
            "train again"
        )
    ours = isinstance(data, PartitionedGraph)
    folder = data.folder if ours else run_dir / "partition"
    given = dict(settings or {})
    if isinstance(given.get("dataset"), str):
        raise ConfigError(f"dataset={given['dataset']}: the data is given from Python; leave it out")
    if not isinstance(given.get("snapshot"), str):
        given = {"snapshot.mode": "none", **given}
    config = settings_to_config(
        {
            **given,
            "run_dir": str(run_dir),
            "dataset.name": "partitioned",
            "partition.folder": str(folder),
        }
    )
    asked, usual = asdict(config.dataset), asdict(DatasetConfig())
    reading = {name: value for name, value in asked.items() if name != "name" and value != usual[name]}
    if ours and reading:
        raise ConfigError(
            f"dataset.{min(reading)}: does not apply to a graph that is partitioned already; leave it out"
        )
    if not ours:
        graph = as_graph(data, layout=config.features.layout, **reading)
        if folder.exists():  # of an earlier call, maybe with other data
            shutil.rmtree(folder)
        partition(graph, folder, parts=1, method="hash")
    excepthook = sys.excepthook
    try:
        code = job.in_process(config)
    finally:
        sys.excepthook = excepthook  # torch.distributed puts "[rank0]:" before every later traceback, once per training
    if code != 0:
        raise RunDirError(f"the run in {run_dir} was stopped before its end (exit code {code})")
    return json.loads((run_dir / "result.json").read_text())


def settings_to_config(settings: Mapping[str, Any]) -> Config:
    """A Config from settings, dotted or nested: ``{"model.hidden": 64, "model": {"layers": 2}}``; the rest keeps its default.

    A group by name, ``{"model": "gat"}``, stands below the other settings, wherever it is, as on the command line.

    Raises:
        ConfigError: as :func:`compose` and :func:`from_mapping`.
    """
    named = {name: value for name, value in settings.items() if isinstance(value, str) and name in groups()}
    # dataset=partitioned, as the default data set changes settings of other groups
    words = [f"{name}={value}" for name, value in {"dataset": "partitioned", **named}.items()]
    nested = to_mapping(compose(words) if named else Config())
    for name, value in settings.items():
        if name in named:
            continue
        for key in reversed(name.split(".")):
            value = {key: value}
        _merge(nested, value)
    return from_mapping(nested)


def _merge(into: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Put nested ``settings`` over those of ``into``. The two never share a dict."""
    for name, value in settings.items():
        if not isinstance(value, Mapping):
            into[name] = value
            continue
        if not isinstance(into.get(name), dict):
            into[name] = {}
        _merge(into[name], value)


def load(run_dir: str | Path) -> torch.nn.Module:
    """The best model of a finished run, in evaluation mode, on the CPU.

    Raises:
        RunDirError: the folder holds no trained model.
    """
    from safetensors import torch as safetensors

    from gemini_gnn.models.build import build_model

    run_dir = Path(run_dir)
    if not (run_dir / "model.safetensors").is_file() or not (run_dir / "model.json").is_file():
        raise RunDirError(
            f"{run_dir} holds no trained model: expected model.safetensors and model.json; give the run_dir of a training"
        )
    card = json.loads((run_dir / "model.json").read_text())
    model = build_model(ModelConfig(**card["model"]), card["in_features"], card["num_classes"], seed=0)
    # Not load_file, for which a file that may not be read does not exist.
    model.load_state_dict(safetensors.load((run_dir / "model.safetensors").read_bytes()))
    return model.eval()


def predict(run_dir: str | Path, data: Any) -> dict[str, np.ndarray]:
    """Exact layer-wise inference of a finished run on a graph with the same features, in the graph's node order.

    Args:
        data: what :func:`as_graph` takes; labels may be missing. It is read with the ``dataset.*`` settings of the run, so
            give what :func:`train` was given, not yet normalised; a Graph or PartitionedGraph is taken as it is.

    Returns:
        ``logits`` float32 ``[nodes, classes]``, ``predictions`` int64 ``[nodes]`` (or uint8 ``[nodes, classes]`` for
        multi-label models), ``embeddings`` float32 ``[nodes, hidden]`` (what enters the last layer) and ``ids``
        ``[nodes]`` as the user knows the nodes.

    Raises:
        RunDirError: no trained model there. DataError: the graph has another number of features.
    """
    from gemini_gnn.halo.exchange import HaloExchange
    from gemini_gnn.sampling.in_edges import ReplicatedInEdges
    from gemini_gnn.sampling.sampler import NeighborSampler
    from gemini_gnn.training.evaluate import Evaluation

    model = load(run_dir)
    reading: dict[str, Any] = {}
    if not isinstance(data, (Graph, PartitionedGraph)):
        # As the data of the training was read. Not its split: a prediction needs none, and this data may lack that one.
        trained = read_config(Path(run_dir)).dataset
        reading = {name: getattr(trained, name) for name in READING if name != "split"}
    graph = as_graph(data, require_labels=False, **reading)
    card = json.loads((Path(run_dir) / "model.json").read_text())
    if graph.x.shape[1] != card["in_features"]:
        raise DataError(
            f"the model in {run_dir} was trained on {card['in_features']} features, {graph.name} has {graph.x.shape[1]}; "
            "give a graph with the same features"
        )
    exact = hasattr(model, "layers") and hasattr(model, "layer")
    n = graph.num_nodes
    in_edges = ReplicatedInEdges(graph.colptr, graph.row, np.arange(n), graph.edge_weight)
    exchange = HaloExchange(None, np.array([0, n]), 0, chunk_bytes=32 << 20, timeout_s=60.0)
    sampler = NeighborSampler(in_edges, [-1] if exact else [-1] * card["model"]["layers"], seed=0)
    evaluation = Evaluation(sampler, exchange, graph.x, 0, n, n, 8192, torch.device("cpu"), exact)
    logits = evaluation.logits(model).numpy()
    found = {"logits": logits}
    found["predictions"] = (logits > 0).astype(np.uint8) if card["multi_label"] else logits.argmax(axis=1)
    if exact or hasattr(model, "embed"):
        found["embeddings"] = evaluation.logits(model, embeddings=True).numpy()
    found["ids"] = graph.node_ids if graph.node_ids is not None else np.arange(n)
    return found
