"""What answers cost: calls of the velocity, and seconds."""

import math
from dataclasses import dataclass

from mambaflow.evaluation.sums import Sums


@dataclass(frozen=True)
class Cost(Sums):
    """What an answer took: calls of the velocity, and seconds of the worker that made it."""

    images: int = 0
    calls: int = 0
    seconds: float = 0.0

    def add(self, images: int, calls: int, seconds: float) -> "Cost":
        """With a batch of images counted in, made together in so many calls and seconds."""
        return self + Cost(images, calls * images, seconds)  # every image was in every call

    def report(self) -> dict[str, float]:
        """`nfe`, calls an image, and `seconds` an image."""
        if not self.images:
            return {"nfe": math.nan, "seconds": math.nan}
        return {"nfe": self.calls / self.images, "seconds": self.seconds / self.images}
