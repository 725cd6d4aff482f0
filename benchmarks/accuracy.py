"""Test accuracy at the best validation, over seeds, ranks and partitions: `python benchmarks/accuracy.py [--seeds 10]`.

Cora (public split, L1 rows), chameleon (undirected), Computers (60/20/20, L2 rows), the default data set beside its
baselines; ranks 1, 2 and 4 with equal global batch. Data sets come from GEMINI_GNN_DATA; those absent are said.
`--precision fp32 bf16_products --only cora computers --ranks 1` puts the precisions side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

from common import machine, write

from gemini_gnn.compose import compose
from gemini_gnn.errors import DataError
from gemini_gnn.graph.baselines import features_only_accuracy, structure_only_accuracy
from gemini_gnn.graph.datasets import load_dataset
from gemini_gnn.training.local import train_local

# data set -> (settings, global batch size, demanded mean on one rank)
CASES = {
    "cora": (["dataset=cora"], 140, 0.80),
    "chameleon": (["dataset=chameleon"], 512, 0.63),
    "computers": (["dataset=computers", "evaluation.every=2"], 1024, 0.895),
    "blocks": (["dataset=blocks", "training.epochs=20"], 1024, 0.84),
}
RANKS = [(1, "metis"), (2, "metis"), (2, "hash"), (4, "metis"), (4, "hash")]


def one(settings: list[str], batch: int, ranks: int, partition: str, precision: str, seed: int, folder: Path) -> float:
    run_dir = folder / f"{ranks}-{partition}-{precision}-{seed}"
    config = compose(
        [
            *settings,
            f"run_dir={run_dir}",
            f"seed={seed}",
            f"partition={partition}",
            f"training.precision={precision}",
            f"sampling.batch_size={batch // ranks}",
            "sampling.order=global",
            "snapshot=none",
            "logger=quiet",
            "training.threads=1",
        ]
    )
    codes = train_local(config, ranks, timeout_s=1800)
    if codes != [0] * ranks:
        raise SystemExit(f"{run_dir}: exit codes {codes}\n" + Path(f"{run_dir}-rank0.log").read_text()[-3000:])
    return json.loads((run_dir / "result.json").read_text())["test_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", choices=list(CASES), nargs="*", default=list(CASES))
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--precision", choices=["fp32", "bf16", "bf16_products"], nargs="*", default=["fp32"])
    parser.add_argument("--output", type=Path, default=Path("results/accuracy.json"))
    options = parser.parse_args()
    table = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.only:
            settings, batch, demanded = CASES[name]
            try:
                graph = load_dataset(compose(settings).dataset)
            except DataError as error:
                print(f"{name}: skipped: {error}")
                continue
            row: dict[str, float | list[float]] = {"demanded": demanded}
            if name == "blocks":
                row |= {
                    "features alone": features_only_accuracy(graph),
                    "structure alone": structure_only_accuracy(graph),
                }
            for (ranks, partition), precision in itertools.product(RANKS, options.precision):
                if ranks not in options.ranks:
                    continue
                folder = Path(temporary) / name
                values = [
                    one(settings, batch, ranks, partition, precision, seed, folder) for seed in range(options.seeds)
                ]
                key = f"{ranks} ranks, {partition}" + (f", {precision}" if precision != "fp32" else "")
                row[key] = values
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                mean = statistics.fmean(values)
                print(f"{name:<10} {key:<31} {mean:.4f} +- {spread:.4f}  ({len(values)} seeds)", flush=True)
            table[name] = row
            print(
                f"{name:<10} demanded >= {demanded}; "
                + ", ".join(f"{k} {v:.4f}" for k, v in row.items() if "alone" in k)
            )
    write(options.output, {"machine": machine(), "seeds": options.seeds, "cases": table})


if __name__ == "__main__":
    main()
