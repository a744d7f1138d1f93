"""Measure the parts of mambaflow side by side, as ratios within one run.

    python jobs/benchmark.py --what scan      the scan against its rivals and the block's GEMMs
    python jobs/benchmark.py --what attention
                                              ours against torch's, in training and sampling
    python jobs/benchmark.py --what step      where a training step's time goes, and its floor
    python jobs/benchmark.py --what sample    every sampler, at growing sizes
    python jobs/benchmark.py --what loader    making batches, against the usual way
    python jobs/benchmark.py --what stall     waiting for shards (s3://…), fetched ahead or not
    python jobs/benchmark.py --what memory    peak memory and time up to a 256 x 256 query
    python jobs/benchmark.py --what ray       what training on Ray costs
    python jobs/benchmark.py --what reference --reference CHECKOUT
                                              a training step against the reference repository's
    python jobs/benchmark.py --what scale     what 8, 64 and 1024 GPUs ask of storage and network

Works on CPU and GPU; prints tables and writes JSON. Exit codes: 0 done, 1 failed, 2 bad input.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

from mambaflow.benchmarks import (
    attention,
    loader,
    memory,
    ray_cost,
    reference,
    sample,
    scale,
    scan,
    stall,
    step,
)
from mambaflow.benchmarks.bench import BenchmarkConfig
from mambaflow.data.shard_reader import data_hash
from mambaflow.host import keep_memory, speak_plainly
from mambaflow.report.tables import Table, provenance
from mambaflow.variables import check_variables

# A part is named here, in BenchmarkConfig.what and in the docstring above.
PARTS: dict[str, Callable[[BenchmarkConfig], list[Table]]] = {
    "scan": scan.measure,
    "attention": attention.measure,
    "step": step.measure,
    "sample": sample.measure,
    "loader": loader.measure,
    "stall": stall.measure,
    "memory": memory.measure,
    "ray": ray_cost.measure,
    "reference": reference.measure,
    "scale": scale.measure,
}


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print; returns the exit code."""
    speak_plainly()
    config = tyro.cli(BenchmarkConfig, args=argv, description=__doc__)
    try:
        check_variables()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Before the first tensor, as in training (see training.process_group).
    if config.keep_memory:
        keep_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        # Flags, data and a checkout can be mended by who calls; a RuntimeError is a measurement
        # that failed.
        tables = PARTS[config.what](config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for table in tables:
        print(table)
    reads_data = config.what in ("loader", "stall", "ray", "scale")
    print(
        # Last of all: a number without its command, machine, data and date says nothing.
        provenance(
            " ".join(["python", *sys.argv]),
            # Which parts read data; the others make up their input from fixed seeds.
            f"{config.data} (hash {data_hash(config.data)})" if reads_data else "made up",
            0,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
    )
    if config.out:
        found = [
            # The tables as they are printed, so that no number is rounded twice in two ways.
            {"heading": list(t.heading), "rows": [list(r) for r in t.rows], "caption": t.caption}
            for t in tables
        ]
        Path(config.out).write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
