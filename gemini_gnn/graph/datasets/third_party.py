"""Published data sets: found or downloaded, imported once into .npy, read from there.

PyG's and OGB's own loaders read the published files, and these contain pickles. So a loader runs once, in a process of
its own, under a temporary root that holds links to the files (the data root may be read-only, and loaders write beside
what they read); it leaves plain arrays, features sparse where that is much smaller. Everything after that reads only
these ``.npy`` and ``x.npz``.

Ownership: ``<cache>/imported/<name>-<digest of the files>`` is complete from the moment it has that name and never changes,
so readers need no lock. Importers take a lock per name; the second importer finds the folder of the first. A killed importer
leaves a ``.<name>.*.tmp`` folder, and the next one removes it. Downloads land in the temporary root and
are moved to ``<cache>/raw/<folder>`` when the loader has accepted them all.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemini_gnn.config import DatasetConfig
from gemini_gnn.errors import DataError
from gemini_gnn.graph.array_folder import locked, ticking
from gemini_gnn.graph.datasets.assemble import RawGraph
from gemini_gnn.graph.datasets.files import cache_folder, digest_of_files, read_folder, root_folder

IMPORT_VERSION = 1  # raise it when the same files would be imported differently
LOCK_TIMEOUT_S = 2 * 3600.0
IMPORT_TIMEOUT_S = 2 * 3600.0


@dataclass(frozen=True)
class Published:
    """Where a loader of PyG or OGB looks for its files.

    Attributes:
        loader, argument: the class and the name it is called with.
        folder: the loader's root within ``dataset.root``.
        raw: the folder of the original files within that; files: those without which it downloads.
        default_split: what ``dataset.split=default`` means when there are no or several official splits.
        symmetric: the loader returns both directions of every edge, once each.
    """

    loader: str
    argument: str
    folder: str
    raw: str
    files: tuple[str, ...]
    default_split: str = "random:0.6,0.2,0.2"
    symmetric: bool = True


def _planetoid(name: str) -> Published:
    parts = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
    files = tuple(f"ind.{name.lower()}.{part}" for part in parts)
    return Published("Planetoid", name, "planetoid", f"{name}/raw", files)


def _wikipedia(name: str) -> Published:
    splits = tuple(f"{name}_split_0.6_0.2_{i}.npz" for i in range(10))
    files = ("out1_node_feature_label.txt", "out1_graph_edges.txt", *splits)
    return Published(
        "WikipediaNetwork", name, "wikipedia_network", f"{name}/geom_gcn/raw", files, default_split="0", symmetric=False
    )


def _amazon(name: str) -> Published:
    return Published("Amazon", name, "amazon", f"{name}/raw", (f"amazon_electronics_{name.lower()}.npz",))


def _coauthor(name: str) -> Published:
    return Published("Coauthor", name, "coauthor", f"{name}/raw", (f"ms_academic_{name[:3].lower()}.npz",))


def _ogb(name: str) -> Published:
    return Published("OGB", name, "ogb", name.replace("-", "_"), ("raw", "split"), symmetric=False)


PUBLISHED = {
    "cora": _planetoid("Cora"),
    "citeseer": _planetoid("CiteSeer"),
    "pubmed": _planetoid("PubMed"),
    "wikics": Published("WikiCS", "", "wikics", "raw", ("data.json",), default_split="0"),
    "chameleon": _wikipedia("chameleon"),
    "squirrel": _wikipedia("squirrel"),
    "computers": _amazon("Computers"),
    "photo": _amazon("Photo"),
    "coauthor_cs": _coauthor("CS"),
    "coauthor_physics": _coauthor("Physics"),
    **{name: _ogb(name) for name in ("ogbn-arxiv", "ogbn-products", "ogbn-proteins", "ogbn-papers100M")},
}


def published_graph(config: DatasetConfig, progress: Callable[[str], None] | None = None) -> RawGraph:
    """The data set ``config.name`` as its publishers made it.

    Raises:
        DataError: its files are absent and cannot be downloaded (says what to put where), or are damaged.
    """
    data_set = PUBLISHED[config.name]
    folder = imported(config, progress)
    return read_folder(
        folder,
        config.name,
        default_split=data_set.default_split,
        symmetric=data_set.symmetric,
        notes={"files": json.loads((folder / "source.json").read_text())["files"]},
    )


def imported(config: DatasetConfig, progress: Callable[[str], None] | None = None) -> Path:
    """The folder of arrays; made first if need be, which may download. Its name ends in the digest of the files.

    Raises:
        DataError: see :func:`published_graph`.
        PartitionError: the cache folder cannot be written.
    """
    data_set, name, say = PUBLISHED[config.name], config.name, progress or (lambda _: None)
    place = cache_folder(config) / "imported"
    if (files := find_files(config, data_set)) is not None:
        folder = place / f"{name}-{digest(files)}"
        if folder.is_dir():
            return folder
    else:
        # The files may have been on another machine or deleted since; what was made of them is as good.
        left = sorted(place.glob(f"{name}-{'?' * 16}"))
        if len(left) == 1:
            return left[0]
    with locked(place / name, LOCK_TIMEOUT_S, say):
        if (files := find_files(config, data_set)) is not None:
            folder = place / f"{name}-{digest(files)}"
            if folder.is_dir():
                return folder
        temporary = place / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.mkdir(mode=0o700)
            what = f"importing {name}" if files is not None else f"downloading {name}"
            with ticking(what, say):
                return import_files(config, data_set, files, temporary, place)
        except OSError as error:
            raise DataError(
                f"cannot write {error.filename or temporary}: {error.strerror or error}; choose another dataset.cache"
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def find_files(config: DatasetConfig, data_set: Published) -> Path | None:
    """The folder with the original files: in the data root, else among the downloads; None if they are in neither."""
    for root in (root_folder(config), cache_folder(config) / "raw"):
        folder = root / data_set.folder / data_set.raw
        if all((folder / file).exists() for file in data_set.files):
            return folder
    return None


def digest(folder: Path) -> str:
    """16 hex digits for the content of the files of a data set and the way they are imported."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "processed" not in path.parts]
    return digest_of_files(files, f"import {IMPORT_VERSION}")


def import_files(config: DatasetConfig, data_set: Published, files: Path | None, temporary: Path, place: Path) -> Path:
    """Run the loader in its own process under ``temporary``; the finished folder within ``place``."""
    root, out = temporary / "root", temporary / "out"
    link_to = root / data_set.raw
    link_to.parent.mkdir(parents=True)
    out.mkdir()
    if files is not None:
        for path in files.rglob("*"):
            link = link_to / path.relative_to(files)
            if path.is_file() and "processed" not in link.relative_to(link_to).parts:
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.absolute())
    problem = run_loader(data_set, root, out, download=files is None)
    if problem is not None:
        raise DataError(absent(config, data_set, problem) if files is None else damaged(config, files, problem))
    if files is None:
        files = cache_folder(config) / "raw" / data_set.folder / data_set.raw
        files.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(link_to / "processed", ignore_errors=True)
        if files.exists():  # an incomplete set of files, or find_files would have taken it
            shutil.rmtree(files)
        os.rename(link_to, files)
    (out / "source.json").write_text(json.dumps({"files": str(files), "loader": data_set.loader}))
    folder = place / f"{config.name}-{digest(files)}"
    os.rename(out, folder)
    return folder


def run_loader(data_set: Published, root: Path, out: Path, download: bool) -> str | None:
    """Let the loader read (or download) into ``root`` and write arrays to ``out``; what went wrong, or None."""
    package_parent = str(Path(__file__).resolve().parents[3])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")])),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    arguments = [data_set.loader, data_set.argument, str(root), str(out), "download" if download else "offline"]
    with tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "gemini_gnn.graph.datasets.import_third_party", *arguments],
                input=b"y\n" * 4,  # OGB asks before it downloads more than a gigabyte
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                timeout=IMPORT_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return f"not finished after {IMPORT_TIMEOUT_S:.0f} s"
        if done.returncode == 0:
            return None
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"the loader ended with exit code {done.returncode}"


def absent(config: DatasetConfig, data_set: Published, problem: str) -> str:
    downloads = cache_folder(config) / "raw" / data_set.folder / data_set.raw
    wanted = root_folder(config) / data_set.folder / data_set.raw
    lacking = [file for file in data_set.files if not (wanted / file).exists()]
    listed = ", ".join(lacking[:8]) + (", ..." if len(lacking) > 8 else "")
    return (
        f"dataset {config.name}: expected its files in {wanted}"
        + (f" or {downloads}" if downloads != wanted else "")
        + f"; they are not (all) there and cannot be downloaded ({problem}). Run `python launch/prepare.py "
        f"dataset={config.name.replace('-', '_')}` where there is a network and the same dataset.cache, or put {listed} "
        f"into {wanted}"
    )


def damaged(config: DatasetConfig, files: Path, problem: str) -> str:
    return (
        f"dataset {config.name}: expected the files as published in {files}; their loader says: {problem}. Put whole ones "
        f"there, or move the folder away and run `python launch/prepare.py dataset={config.name.replace('-', '_')}` where "
        "there is a network"
    )
