"""Completing held-out images by a model, a sampler or a classical fill, and scoring them together.

The task: the known pixels of the staged masks are given, all others are asked, and the known ones
are copied into the answer.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mambaflow.checks import require
from mambaflow.data.batches import Layout, PixelBatch, RowReader
from mambaflow.data.pixels import choose, copy_known, unknown
from mambaflow.data.random_bits import drawn, normal, uniform
from mambaflow.data.shard_reader import ShardSet
from mambaflow.evaluation.activity import activity, sextile_edges, sextiles
from mambaflow.evaluation.baselines import fill_images
from mambaflow.evaluation.metrics import Scores
from mambaflow.evaluation.scored_images import Completion
from mambaflow.flow.samplers import CountedVelocity, Solver, times_for
from mambaflow.models.velocity_field import VelocityField

# Images completed at a time, the same for any number of workers: see `score`.
CHUNK = 32
# Of draws of held-out images. Where ids are places in the split, a draw is the first of the order
# in which jobs/evaluate.py takes them.
ORDER_SEED, ORDER = 0, "evaluation/order"
Images = Float[Tensor, "m h w 3"]


class NotFiniteError(ValueError):
    """Answers of a model that are no numbers, or infinite: no score says anything of them."""


@dataclass(frozen=True)
class EvalSet:
    """Held-out images with their masks."""

    layout: Layout
    images: UInt8[Tensor, "m h w 3"]
    known: Int[Tensor, "m k"]
    ids: Int[Tensor, " m"]
    sextile: UInt8[Tensor, "m h w"]
    """How busy the known pixels around each pixel are, in sixths of the set that was read: a part
    of it, such as one worker's, keeps the edges of the whole."""
    asked: Int[Tensor, "m n"] | None = None
    """The pixels that are asked; None: all that are not known."""

    @classmethod
    def read(cls, reader: RowReader, layout: Layout, count: int) -> "EvalSet":
        """`count` images with their staged masks, drawn from all by their ids, a larger draw
        beginning with a smaller; or all in the order of the shards, if there are no more."""
        rows = np.arange(len(reader))
        if count < len(rows):
            ids = torch.from_numpy(reader.rows(rows, pixels=False, images=False).ids)
            rows = drawn(ORDER_SEED, ORDER, ids, count).numpy()
        return cls._of(reader, layout, rows, None, None)

    @classmethod
    def of_rows(
        cls,
        split: ShardSet,
        layout: Layout,
        rows: Int[np.ndarray, " m"],
        edges: Float[np.ndarray, " edges"] | None = None,
    ) -> "EvalSet":
        """Some rows of a split, in the order given.

        Args:
            layout: may hold another number of known pixels than was staged. Masks are nested: of
                two shares of one image, the pixels of the smaller are among those of the larger.
            edges: of the sextiles (evaluation.activity); by default of these rows.
        """
        spec = split.spec
        ids = torch.from_numpy(split.rows(rows, pixels=False, images=False).ids)
        known = choose(spec.mask_seed, spec.split, ids, spec.size, layout.known, 0)
        return cls._of(split, layout, rows, known, edges)

    @classmethod
    def _of(
        cls, reader: RowReader, layout: Layout, rows: np.ndarray, known: Tensor | None,
        edges: np.ndarray | None,
    ) -> "EvalSet":  # fmt: skip
        held = reader.rows(rows)
        if held.images is None:
            raise ValueError("held-out shards must hold whole images; stage the data again")
        images = torch.from_numpy(held.images).view(-1, layout.size, layout.size, 3)
        if known is None:
            # A row's known pixels come first; those after them are targets of training.
            known = torch.from_numpy(held.index.astype(np.int64))[:, : layout.known]
        active = activity(images.numpy(), known.numpy())
        edges = sextile_edges(active, known.numpy()) if edges is None else edges
        sixths = torch.from_numpy(sextiles(active, edges))
        return cls(layout, images, known, torch.from_numpy(held.ids), sixths)

    def __len__(self) -> int:
        return len(self.ids)

    def some(self, count: int) -> "EvalSet":
        """As many of them, drawn by their ids as `read` draws them; all if there are fewer."""
        return self[drawn(ORDER_SEED, ORDER, self.ids, count)]

    def __getitem__(self, rows: slice | Int[Tensor, " rows"]) -> "EvalSet":
        asked = None if self.asked is None else self.asked[rows]
        return EvalSet(
            self.layout, self.images[rows], self.known[rows], self.ids[rows], self.sextile[rows],
            asked,
        )  # fmt: skip

    def asking(self, count: int) -> "EvalSet":
        """The same, with `count` of the unknown pixels asked: another choice for each image, which
        its id alone decides."""
        others = unknown(self.known, self.layout.size)
        require(
            0 < count <= others.shape[1],
            f"asked (={count}) must be in [1, {others.shape[1]}], the unknown pixels; use fewer",
        )
        words = uniform(0, "asked", count, self.ids, others.shape[1])
        return replace(self, asked=others.gather(1, words.argsort(dim=-1, stable=True)[:, :count]))

    def chunk(self, number: int) -> "EvalSet":
        """A few of the images, as many as are completed at a time."""
        return self[number * CHUNK : (number + 1) * CHUNK]

    @property
    def truth(self) -> Images:
        """The images in [0, 1]."""
        return self.images / 255

    @property
    def is_known(self) -> Bool[Tensor, "m h w"]:
        """Which pixels are given."""
        flat = torch.zeros(len(self), self.layout.size**2, dtype=torch.bool)
        return flat.scatter(1, self.known, True).view(self.images.shape[:3])

    @property
    def _copied(self) -> Bool[Tensor, "m h w"]:
        # What is not asked either is copied from the truth too, and scored no more than the known.
        if self.asked is None:
            return self.is_known
        flat = torch.ones(len(self), self.layout.size**2, dtype=torch.bool)
        return flat.scatter(1, self.asked, False).view(self.images.shape[:3])

    @property
    def mask_hash(self) -> str:
        """What two results must share to be compared."""
        # As shards hold them, in 16 bits: the hash is of the masks, not of today's dtype.
        return hashlib.sha256(self.known.numpy().astype(np.uint16).tobytes()).hexdigest()[:12]

    def batch(self) -> tuple[PixelBatch, Int[Tensor, "m n"]]:
        """The known pixels, and those asked as queries; and which those are."""
        others = unknown(self.known, self.layout.size) if self.asked is None else self.asked
        index = torch.cat((self.known, others), 1)  # (m, k + n), the known first: see Layout.batch
        colours = self.images.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 3))
        return self.layout.batch(index, colours, self.ids), others

    def assemble(self, others: Int[Tensor, "m n"], rgb: Float[Tensor, "m n 3"]) -> Images:
        """Whole images in [0, 1] from the colours of the pixels asked."""
        return self._whole(others, self.layout.image(rgb.cpu()))

    def unclipped(self, others: Int[Tensor, "m n"], rgb: Float[Tensor, "m n 3"]) -> Images:
        """The same images on the same scale, with colours beyond [0, 1] as they were answered."""
        return self._whole(others, self.layout.unclipped(rgb.cpu()))

    def _whole(self, others: Int[Tensor, "m n"], colours: Float[Tensor, "m n 3"]) -> Images:
        # The answers are written into the truth: its known pixels are not touched at all.
        known = self.truth.flatten(1, 2)
        return copy_known(known, others, colours).view(self.images.shape)

    def completion(
        self, images: Images, calls: int | None = None, seconds: float = 0.0,
        around: Completion | None = None, unclipped: Images | None = None,
    ) -> Completion:  # fmt: skip
        """An answer for these images, ready to be scored.

        Args:
            images: in [0, 1].
            around: the posterior mean, where the answer is a sample.
            unclipped: the same as `images` before clipping, where there was any.
        """
        mean = None if around is None else around.answer
        return Completion(
            images, self.truth, self._copied, mean, calls, seconds, self.sextile, unclipped
        )


def numbers(
    ids: Int[Tensor, " m"], stream: int, *shape: int, sample: int = 0
) -> Float[Tensor, "m ..."]:
    """Standard normal numbers of a shape that begins with the images.

    Args:
        stream: 0 where a path starts, from 1 on for the noise of its steps.
        sample: of several of an image, which.
    """
    # By the image's id, on CPU: the same noise in any chunk, on any worker and any device.
    return normal(sample, "evaluation", stream, ids, math.prod(shape[1:])).view(shape)


def complete(
    model: VelocityField,
    eval_set: EvalSet,
    solver: Solver,
    steps: int = 1,
    *,
    grid: str = "uniform",
    around: Completion | None = None,
    sample: int = 0,
    **settings: float | int,
) -> Completion:
    """What a solver makes of noise, all images at once; all noise is a function of their ids.

    Args:
        solver: of the registry flow.samplers.SOLVERS.
        steps: intervals of the grid.
        around: the posterior mean, where the solver draws a sample around it.
        sample: of several of each image, which.
        settings: of the solver, such as its temperature.

    Raises:
        NotFiniteError: the model's weights are too large, or none.
    """
    # The time is of all that an answer takes, reading the known pixels included.
    start = time.perf_counter()
    device = next(model.parameters()).device
    batch, others = eval_set.batch()

    with torch.no_grad():
        # The known pixels are read once for all calls.
        field = model.condition(batch.to(device))
        velocity = CountedVelocity(field)

        def draw(stream: int) -> Float[Tensor, "m n 3"]:
            return field.noise(partial(numbers, eval_set.ids, stream, sample=sample))

        # Stream 0 is where paths start, those from 1 on are the noise of the solver's steps.
        rgb = solver(velocity, draw(0), times_for(grid, steps), lambda i: draw(i + 1), **settings)
    whole = eval_set.unclipped(others, rgb)  # on CPU: what a GPU still had to do is done
    seconds = time.perf_counter() - start
    # Before it is clipped, which would make an image of what is infinite.
    if not whole.isfinite().all():
        raise NotFiniteError(f"answers of the model (to {len(eval_set)} images) are not finite")
    return eval_set.completion(whole.clamp(0, 1), velocity.calls, seconds, around, whole)


def fill(name: str, eval_set: EvalSet) -> Completion:
    """A classical fill of the same masks."""
    truth = eval_set.truth.flatten(1, 2)
    rgb = truth.gather(1, eval_set.known[..., None].expand(-1, -1, 3))  # (m, k, 3)
    filled = fill_images(name, eval_set.known.numpy(), rgb.double().numpy(), eval_set.layout.size)
    return eval_set.completion(torch.from_numpy(filled).float().clamp(0, 1))


# A protocol: `training`, whose ProcessGroup this is, imports this wing and not the reverse.
@runtime_checkable
class Workers(Protocol):
    """Who shares the scoring: as much as it needs to know of a process group."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, values: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Alone:
    """One process that shares with nobody."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the one worker."""
        return values


# All ways of completing a chunk of images, by name: each chunk is answered by one worker.
Methods = Callable[[EvalSet], Mapping[str, Completion]]


def score(
    names: list[str], methods: Methods, eval_set: EvalSet, workers: Workers | None = None
) -> dict[str, Scores]:
    """The scores of every method, its chunks shared out over the workers.

    Chunks are the same for any number of workers, and their sums are added in the order of the
    chunks: one worker or eight give the same bits.

    Args:
        names: what `methods` answers by: a worker without a chunk has no answer to learn it from.

    Raises:
        NotFiniteError: by every worker, where a chunk of any of them had such answers.
    """
    workers = workers or Alone()
    chunks = -(-len(eval_set) // CHUNK)
    # A row for each chunk, not one for each worker: rows are summed up below in their own order,
    # whoever filled them.
    sums = torch.zeros(chunks, len(names) * len(Scores().flat()) + 1, dtype=torch.float64)
    for number in range(workers.rank, chunks, workers.size):
        try:
            answers = methods(eval_set.chunk(number))
        # Told with the sums: the others wait for this worker in them.
        except NotFiniteError:
            sums[number, -1] = 1
            continue
        # In the order of `names`, which all workers share.
        flat = [x for name in names for x in Scores().add(answers[name]).flat()]
        sums[number, :-1] = torch.tensor(flat, dtype=torch.float64)
    sums = workers.all_reduce(sums)  # others' rows are zeros: each sum is exact
    if sums[:, -1].any():
        raise NotFiniteError("answers of the model to held-out images are not finite")
    total = {name: Scores() for name in names}
    for row in sums.tolist():
        # Each `unflat` takes from it as many numbers as its sums have.
        numbers = iter(row)
        total = {name: scores + scores.unflat(numbers) for name, scores in total.items()}
    return total
