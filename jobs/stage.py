"""Stage images as sparse shards for training.

    python jobs/stage.py --source sample --out data/sample
    python jobs/stage.py --source train.parquet --out s3://bucket/cifar10

One Ray task makes one shard. A staging that stopped goes on where it was: finished shards are
kept. Exit codes: 0 done; 2 bad input, nothing published; 1 failed.
"""

import itertools
import logging
import sys
from collections.abc import Iterator

import tyro
from tqdm import tqdm

from mambaflow.data.sources import Source, open_source
from mambaflow.data.staging import ShardResult, ShardTask, StageConfig, in_process, make, stage

IN_FLIGHT = 64
RETRIES = 3


def on_ray(tasks: list[ShardTask]) -> Iterator[ShardResult]:
    """Make shards on the cluster at RAY_ADDRESS or a private one, a bounded number at a time."""
    from mambaflow.distributed.cluster import connect
    from mambaflow.distributed.train import ray

    with connect():
        remote = ray.remote(make).options(
            num_cpus=1, max_retries=RETRIES, retry_exceptions=[OSError]
        )
        running = [remote.remote(task) for task in tasks[:IN_FLIGHT]]
        waiting = iter(tasks[IN_FLIGHT:])
        while running:
            done, running = ray.wait(running)
            running += [remote.remote(task) for task in itertools.islice(waiting, len(done))]
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error


def shown(tasks: list[ShardTask], config: StageConfig, source: Source) -> Iterator[ShardResult]:
    """The shards as they are made, with a progress bar."""
    run = on_ray if config.ray else in_process(source)
    return iter(tqdm(run(tasks), total=len(tasks), unit="shard", disable=None))


def main(argv: list[str] | None = None) -> int:
    """Parse, stage, say what was done; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where keys were found
    config = tyro.cli(StageConfig, args=argv, description=__doc__)
    try:
        source = open_source(config.source)
        done = stage(config, source, lambda tasks: shown(tasks, config, source))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"staged {config.source} to {config.out}: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
