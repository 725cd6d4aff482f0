"""A program of its own: let a loader of PyG or OGB read its files (pickles among them) and write plain arrays.

    python -m gemini_gnn.graph.datasets.import_third_party LOADER ARGUMENT ROOT OUT download|offline

Only :mod:`third_party` starts it. The last line on stderr is the reason when it fails.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import traceback
import warnings
from pathlib import Path

import numpy as np

from gemini_gnn.graph.sparse import SparseRows, laid_out

NETWORK_TIMEOUT_S = 15.0


def main(loader: str, argument: str, root: str, out: str, network: str) -> int:
    warnings.simplefilter("ignore")
    try:
        read = ogb_arrays if loader == "OGB" else pyg_arrays
        arrays = read(loader, argument, root, network == "download")
        for name, array in arrays.items():
            save(Path(out), name, laid_out(array, "auto") if name == "x" else array)
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def save(folder: Path, name: str, array: np.ndarray | SparseRows) -> None:
    """Write ``name.npy``, or ``name.npz`` of sparse rows."""
    if isinstance(array, SparseRows):
        import scipy.sparse

        matrix = scipy.sparse.csr_array((array.values(), array.columns(), array.ptr), shape=array.shape)
        scipy.sparse.save_npz(folder / f"{name}.npz", matrix, compressed=False)
    else:
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def pyg_arrays(loader: str, argument: str, root: str, download: bool) -> dict[str, np.ndarray]:
    import torch_geometric.datasets

    kind = getattr(torch_geometric.datasets, loader)
    if download:
        require_network(getattr(kind, "url", None) or kind.processed_url)
    else:
        kind = type(loader, (kind,), {"download": _refuse})
    if loader == "WikiCS":
        data = kind(root, is_undirected=True)[0]
    else:
        data = kind(root, argument)[0]
    arrays = {name: data[name].numpy() for name in ("edge_index", "x", "y")}
    for name in ("train_mask", "val_mask", "test_mask"):
        if name in data:
            arrays[name] = data[name].numpy()
    return arrays


def ogb_arrays(loader: str, argument: str, root: str, download: bool) -> dict[str, np.ndarray]:
    import torch

    sys.modules["outdated"] = None  # type: ignore[assignment]  # ogb asks the network for its version in a thread
    try:
        from ogb.nodeproppred import NodePropPredDataset
        from ogb.nodeproppred import dataset as ogb_dataset
    except ImportError:
        raise RuntimeError("OGB's loader is not installed; pip install 'gemini-gnn[ogb]'") from None
    # ogb 1.3.6 calls bare torch.load for what it has just written itself and for split_dict.pt.
    torch.load = functools.partial(torch.load, weights_only=False)
    if download:
        require_network("http://snap.stanford.edu")
    else:
        ogb_dataset.decide_download = _refuse
    folder = Path(root) / argument.replace("-", "_")
    if folder.is_dir():
        # Without this mark OGB takes the files for an older release and downloads a newer one.
        (folder / "processed").mkdir(exist_ok=True)
        for version in ("1", "2"):
            (folder / f"RELEASE_v{version}.txt").touch()
    data = NodePropPredDataset(argument, root=root)
    graph, labels = data[0]
    if "edge_index" not in graph:
        raise RuntimeError(f"{argument} has several kinds of nodes; only homogeneous graphs are supported")
    arrays = {"edge_index": graph["edge_index"], "y": labels}
    if graph["node_feat"] is not None:
        arrays["x"] = graph["node_feat"].astype(np.float32)
    for name, part in (("train_mask", "train"), ("val_mask", "valid"), ("test_mask", "test")):
        arrays[name] = np.zeros(graph["num_nodes"], dtype=bool)
        arrays[name][np.asarray(data.get_idx_split()[part])] = True
    return arrays


def require_network(url: str) -> None:
    """Fail in seconds rather than after minutes of retries.

    Raises:
        ConnectionError: nothing answers at ``url``.
    """
    import ssl
    import urllib.error
    import urllib.request

    answer: list[BaseException | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_S).close()
            answer.append(None)
        except urllib.error.HTTPError:
            answer.append(None)  # somebody answered
        except urllib.error.URLError as error:
            # PyG does not check certificates, so a proxy with one of its own is no obstacle.
            answer.append(None if isinstance(error.reason, ssl.SSLError) else error)
        except BaseException as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # a look-up of a name has no timeout of its own
    thread.start()
    thread.join(NETWORK_TIMEOUT_S)
    if not answer or answer[0] is not None:
        reason = answer[0] if answer else f"no answer within {NETWORK_TIMEOUT_S:.0f} s"
        raise ConnectionError(f"no network: {url}: {reason}")


def _refuse(_) -> None:
    raise RuntimeError("a file is missing; all of them are needed")


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # a daemon thread may hang in a name look-up
