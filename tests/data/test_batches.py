"""The stream of batches is a function of (seed, step), the same for any number of workers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambaflow.config import TrainConfig
from mambaflow.data.batches import Batches, Layout, Prefetcher, RowOrder
from mambaflow.data.shards import Rows

SIZE, KNOWN, TARGET = 8, 12, 12


class Reader:
    """Rows made up from their numbers, counting what is read."""

    def __init__(self, count: int, images: bool = True) -> None:
        self.count, self.images, self.seen = count, images, []
        self.shuffle_block, self.expected, self.wanted = count, [], set()

    def __len__(self) -> int:
        return self.count

    def expect(self, numbers: np.ndarray) -> None:
        self.expected.extend(numbers.tolist())

    def rows(self, numbers: np.ndarray, *, pixels: bool = True, images: bool = True) -> Rows:
        self.seen.extend(numbers.tolist())
        self.wanted.add((pixels, images))
        photos = np.stack(
            [np.random.default_rng(n).integers(0, 256, (SIZE * SIZE, 3)) for n in numbers]
        )
        index = np.stack([np.random.default_rng(n).permutation(SIZE * SIZE) for n in numbers])
        index = index[:, : KNOWN + TARGET]
        rgb = np.take_along_axis(photos, index[..., None], 1).reshape(len(numbers), -1)
        whole = photos.reshape(len(numbers), -1).astype(np.uint8) if self.images else None
        made = Rows(numbers, numbers, index.astype(np.uint16), rgb.astype(np.uint8), whole)
        return made.take(np.arange(len(numbers)), pixels, images)


def stream(config: TrainConfig, rank: int = 0, world: int = 1, count: int = 50) -> Batches:
    return Batches(Reader(count), Layout(SIZE, KNOWN, TARGET), config, rank, world)


@pytest.mark.parametrize(("masks", "wanted"), [("strict", (True, False)), ("fresh", (False, True))])
def test_no_column_is_read_that_the_masks_do_not_use(masks, wanted):
    batches = stream(TrainConfig(batch_size=8, masks=masks))
    assert batches[0].query_rgb.shape == (8, TARGET, 3) and batches.reader.wanted == {wanted}


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), block=st.integers(1, 400),
    epoch=st.integers(0, 2**20),
)  # fmt: skip
def test_every_epoch_has_each_row_once(rows, seed, block, epoch):
    order = RowOrder(rows, seed, block)
    got = order.row(torch.arange(epoch * rows, (epoch + 1) * rows))
    assert got.sort().values.tolist() == list(range(rows))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 5000), cut=st.integers(1, 99), block=st.integers(1, 5000))
def test_the_row_of_a_sample_does_not_depend_on_what_is_asked_beside_it(rows, cut, block):
    order, number = RowOrder(rows, 7, block), torch.arange(100)
    parts = torch.cat((order.row(number[:cut]), order.row(number[cut:])))
    assert torch.equal(order.row(number), parts)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 20000), first=st.integers(0, 40000), count=st.integers(1, 9000))
def test_a_stretch_of_samples_has_the_rows_of_each(rows, first, count):
    order = RowOrder(rows, 5)
    each = order.row(torch.arange(first, first + count)).numpy()
    assert np.array_equal(order.stretch(first, count), each)


def test_a_thousand_million_rows_need_no_table():
    order = RowOrder(10**9, 3)
    number = torch.arange(10**9 - 1000, 10**9 + 1000)
    rows = order.row(number)
    assert rows.min() >= 0 and rows.max() < 10**9
    assert len(rows.unique()) > 1990  # the second half is the next epoch's
    assert len({int(r) // 2**20 for r in order.row(torch.arange(2**20))}) == 1


def test_orders_of_other_epochs_and_seeds_are_other_shuffles():
    a, b = RowOrder(1000, 1), RowOrder(1000, 2)
    first, second = a.row(torch.arange(1000)), a.row(torch.arange(1000, 2000))
    for one, other in ((first, second), (first, b.row(torch.arange(1000)))):
        same = (one == other).float().mean().item()
        assert same < 0.01
        assert abs(np.corrcoef(one.numpy(), other.numpy())[0, 1]) < 0.1


@pytest.mark.parametrize("masks", ["strict", "fresh"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_global_batch_is_the_same_for_any_number_of_workers(masks, world):
    config = TrainConfig(batch_size=12, masks=masks, max_queries=10, min_queries=4)
    for step in (0, 3, 4, 1000):  # step 4 straddles two epochs of 50 rows
        whole = stream(config)[step]
        parts = [stream(config, rank, world)[step] for rank in range(world)]
        for name in ("known_xy", "known_rgb", "query_xy", "query_rgb", "number"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
        assert torch.equal(whole.noise(5), torch.cat([p.noise(5) for p in parts]))
        assert torch.equal(whole.times(5), torch.cat([p.times(5) for p in parts]))


def test_no_worker_reads_rows_of_another():
    config = TrainConfig(batch_size=10)
    workers = [stream(config, rank, 2) for rank in range(2)]
    for worker in workers:
        _ = [worker[step] for step in range(5)]  # an epoch of 50 rows
    seen = [set(worker.reader.seen) for worker in workers]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(50))


def test_a_step_can_be_asked_for_out_of_order():
    config = TrainConfig(batch_size=5, masks="fresh", min_queries=1, max_queries=20)
    used = stream(config)
    _ = [used[step] for step in (9, 2, 7)]
    assert torch.equal(used[4].query_rgb, stream(config)[4].query_rgb)


def test_fresh_masks_change_with_the_epoch_and_known_never_meets_target():
    batches = stream(TrainConfig(batch_size=50, masks="fresh"))
    first, second = batches[0], batches[1]
    places = [set(map(tuple, b.known_xy[0].tolist())) for b in (first, second)]
    assert places[0] != places[1]
    for known, asked in zip(first.known_xy, first.query_xy, strict=True):
        assert not set(map(tuple, known.tolist())) & set(map(tuple, asked.tolist()))


def test_the_number_of_queries_is_drawn_within_its_bounds():
    batches = stream(TrainConfig(batch_size=2, masks="fresh", min_queries=3, max_queries=9))
    drawn = {batches.queries(step) for step in range(200)}
    assert drawn == set(range(3, 10))


def test_fresh_masks_without_whole_images_are_refused_with_the_cure():
    batches = Batches(
        Reader(9, images=False),
        Layout(SIZE, KNOWN, TARGET),
        TrainConfig(batch_size=3, masks="fresh"),
    )
    with pytest.raises(ValueError, match="stage again with --full-images"):
        _ = batches[0]


def test_more_queries_than_targets_are_refused():
    with pytest.raises(
        ValueError, match=r"max_queries \(=13\) must be at most 12 .* --masks fresh"
    ):
        stream(TrainConfig(batch_size=2, min_queries=1, max_queries=13))


@pytest.mark.parametrize(("coordinates", "low"), [("centre", -1.0), ("corner", 0.0)])
def test_a_layout_places_and_colours_as_the_model_was_told(coordinates, low):
    layout = Layout(SIZE, KNOWN, TARGET, coordinates, low)
    corner = layout.xy(torch.tensor([[0, SIZE * SIZE - 1]]))
    edge = 0.0 if coordinates == "corner" else 0.5 / SIZE
    assert corner.tolist() == [[[edge, edge], [1 - edge, 1 - edge]]]
    colours = torch.tensor([[[0, 255, 51]]], dtype=torch.uint8)
    rgb = layout.rgb(colours)
    torch.testing.assert_close(rgb, torch.tensor([[[low, 1.0, low + (1 - low) * 0.2]]]))
    torch.testing.assert_close(layout.image(rgb), colours / 255)


def test_rows_are_expected_one_window_before_they_are_asked_for():
    reader = Reader(40)
    reader.shuffle_block = 8
    batches = Batches(reader, Layout(SIZE, KNOWN, TARGET), TrainConfig(batch_size=4))
    for step in range(12):
        batches[step]
    assert reader.expected[:40] == reader.seen[8:48]
    assert set(reader.seen[:8]) == set(range(min(reader.seen[:8]), max(reader.seen[:8]) + 1))


def test_rows_that_are_all_open_are_not_expected():
    batches = stream(TrainConfig(batch_size=10))
    batches[0], batches[5]
    assert batches.reader.expected == []


def test_batches_made_ahead_are_the_same_and_ready_before_they_are_asked_for():
    config = TrainConfig(batch_size=10)
    alone, ahead = (
        stream(config),
        Prefetcher(stream(config), torch.device("cpu"), steps=11, depth=3),
    )
    for step in (4, 5, 6, 9):
        got, want = ahead[step], alone[step]
        assert torch.equal(got.query_rgb, want.query_rgb) and torch.equal(got.number, want.number)
    assert len(ahead.stream.reader.seen) // 10 >= 6, "steps 4 to 9, made in order"
    assert sorted(ahead._coming) == [10], "and none beyond the last"
    ahead.close()


def test_a_batch_that_cannot_be_made_fails_where_it_is_asked_for():
    ahead = Prefetcher(
        stream(TrainConfig(batch_size=10, masks="fresh")), torch.device("cpu"), 9, depth=2
    )
    ahead.stream.reader.images = False
    with pytest.raises(ValueError, match="needs whole training images"):
        ahead[0]
