"""Stage images as sparse shards for training.

    python jobs/stage.py --source sample --out data/sample
    python jobs/stage.py --source train.parquet --out s3://bucket/cifar10
    python jobs/stage.py --source s3://bucket/images/ --out data/images

What was found is said before anything is written: images of each split, classes, what was passed
over, by kind and why, and what will be fetched. A source in S3 is read where it lies; one that
changes meanwhile is refused by name. Of a source without a validation or test split these are cut
out of training. One Ray task makes one shard. A staging that stopped goes on where it was: finished
shards are kept. Exit codes: 0 done; 2 bad input, nothing published; 1 failed, and 143 stopped
(SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP): the same command goes on.
"""

import logging
import sys
from collections.abc import Iterable, Iterator

import tyro
from tqdm import tqdm

from mambaflow.data.shard_task import ShardResult, ShardTask
from mambaflow.data.source import Source
from mambaflow.data.stage_config import StageConfig
from mambaflow.data.staging import in_process, opened, stage
from mambaflow.distributed.environment import set_ray_environment
from mambaflow.host import FAILED, leave, speak_plainly
from mambaflow.signals import leaving
from mambaflow.variables import check_variables

GOES_ON = "the same command goes on"


def on_ray(tasks: list[ShardTask]) -> Iterable[ShardResult]:
    """Make the shards over Ray."""
    set_ray_environment()  # before Ray is imported, which this import does
    from mambaflow.distributed.staging import on_ray

    return on_ray(tasks, lost)


def lost(why: str) -> None:
    """The cluster is: end at once."""
    print(f"\nerror: {why}\n{GOES_ON}", file=sys.stderr)
    leave(FAILED)


def shown(tasks: list[ShardTask], config: StageConfig, source: Source) -> Iterator[ShardResult]:
    """The shards as they are made, with a progress bar."""
    run = on_ray if config.ray else in_process(source)
    # disable=None: no bar where nobody watches, as in the log of a job.
    return iter(tqdm(run(tasks), total=len(tasks), unit="shard", disable=None))


def main(argv: list[str] | None = None) -> int:
    """Parse, stage, say what was done; returns the exit code."""
    speak_plainly()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where keys were found
    # Outside of `try`: a flag that tyro refuses ends the process with code 2 by itself.
    config = tyro.cli(StageConfig, args=argv, description=__doc__)
    try:
        check_variables()
        source = opened(config)
        # To stderr, as all that is said on the way: the last line alone is the answer.
        print(f"{config.source}:", *source.found().lines(), sep="\n  ", file=sys.stderr)
        # Called once, with the tasks of all splits: one bar for all of them.
        with leaving():
            done = stage(config, source, lambda tasks: shown(tasks, config, source))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}\n{GOES_ON}", file=sys.stderr)
        return FAILED
    print(f"staged {config.source} to {config.out}: {done}")
    return 0


if __name__ == "__main__":
    leave(main())
