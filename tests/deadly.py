"""An actor of an evaluation that one kind of unit kills, as one that takes all memory would be."""

import os
import pickle

from mambaflow.distributed.evaluate import Worker


class Deadly(Worker):
    """As its parent, but for Heun's method."""

    def __call__(self, batch):
        if pickle.loads(batch["unit"][0]).cell.sampler == "heun":
            os._exit(1)
        return super().__call__(batch)
