"""What an evaluation asks: cells from flags, and images in a seeded order."""

from dataclasses import replace

import numpy as np
import pytest

from mambaflow.data.shards import ShardSpec
from mambaflow.evaluation.cells import (
    NO_CHECKPOINT,
    Cell,
    EvaluateConfig,
    cells,
    group_size,
    order,
)

SPEC = ShardSpec(
    source="test", split="test", size=32, known=204, target=204, mask_seed=42, full_images=True,
    rows_per_shard=16,
)  # fmt: skip
HEUN = Cell("a", "heun", "", 10, 32, 204, 0)


def config(**values) -> EvaluateConfig:
    return EvaluateConfig(**{"checkpoint": ("a=runs/a",), "samplers": ("heun",), **values})


def of_model(asked: EvaluateConfig, names=("a",)) -> list[Cell]:
    return [cell for cell in cells(asked, list(names), SPEC) if not cell.is_fill]


def test_the_default_is_one_answer_at_ten_calls_beside_the_fills():
    found = cells(config(), ["a"], SPEC)
    fills = [Cell(NO_CHECKPOINT, f, "", 0, 32, 204, 0) for f in ("nearest", "linear", "thin-plate")]
    assert found == [*fills, HEUN]


def test_each_axis_varies_alone_at_the_calls_that_stand_for_the_others():
    asked = config(
        nfe=(2, 10, 100), resolutions=(64, 96), known_shares=(0.05, 0.2, 0.5), asked=(204, 820),
    )  # fmt: skip
    assert set(of_model(asked)) == {
        *(replace(HEUN, nfe=nfe) for nfe in (2, 10, 100)),
        *(replace(HEUN, resolution=size) for size in (64, 96)),
        *(replace(HEUN, known=known) for known in (51, 204, 512)),
        replace(HEUN, asked=204),
    }, "820 asked is all of them, and 204 known is as staged: neither is a cell of its own"


def test_crossing_combines_all_but_a_part_of_a_finer_grid():
    asked = config(
        nfe=(10, 20), resolutions=(32, 64), known_shares=(0.2, 0.5), asked=(100,), cross=True
    )
    found = of_model(asked)
    assert len(found) == len(set(found)) == 2 * 2  # all at 32, where alone 100 can be asked
    assert {cell.resolution for cell in found} == {32} and {cell.asked for cell in found} == {100}
    whole = of_model(replace(asked, asked=()))
    assert len(whole) == 2 * 2 * 2 and {cell.resolution for cell in whole} == {32, 64}


def test_a_budget_too_small_for_a_sampler_is_no_cell_and_an_odd_one_is_rounded_down():
    found = of_model(config(samplers=("heun", "ddim", "mean"), nfe=(1, 7)))
    assert [(cell.sampler, cell.nfe) for cell in found] == [
        ("heun", 6), ("ddim", 1), ("ddim", 7), ("mean", 1),
    ]  # fmt: skip


def test_settings_are_part_of_the_cell_of_the_samplers_that_take_them():
    found = of_model(config(samplers=("heun", "sde", "ddim"), temperature=0.25, eta=0.3))
    assert [cell.settings for cell in found] == ["", "temperature=0.25", "eta=0.3"]
    assert found[1].options == ("uniform", {"temperature": 0.25, "noiseless_steps": 1})
    (long,) = of_model(config(samplers=("sde",), nfe=(100,)))
    assert long.options[1]["noiseless_steps"] == 5, "of fifty steps, as its own default"
    assert found[2].options == ("uniform", {"eta": 0.3})
    (curved,) = of_model(config(samplers=("ddim",), grid="quadratic"))
    assert curved.settings == "eta=0,grid=quadratic" and curved != found[2]
    assert curved.options == ("quadratic", {"eta": 0.0})


def test_fills_are_asked_at_every_share():
    found = cells(config(known_shares=(0.05,), fills=("linear",)), ["a"], SPEC)
    assert [cell.known for cell in found if cell.is_fill] == [204, 51]


BAD = {
    "unknown sampler": ({"samplers": ("euler",)}, "unknown sampler 'euler'; valid: mean, "),
    "unknown fill": ({"fills": ("blur",)}, "unknown fill 'blur'; valid: nearest, "),
    "no call": ({"nfe": (0,)}, r"nfe \(=\[0\]\) must be positive; use 1 or more"),
    "a share of all": ({"known_shares": (1.0,)}, r"known_shares \(=\[1.0\]\) must be in \(0, 1\)"),
    "eta": ({"eta": 1.5}, r"eta \(=1.5\) must be in \[0, 1\]"),
    "temperature": ({"temperature": -1.0}, r"temperature \(=-1.0\) must be in \[0, 10\]"),
    "no checkpoint": ({"checkpoint": ()}, "must name a run for the samplers; use --checkpoint RUN"),
    "nothing": ({"samplers": (), "fills": ()}, "leave nothing to do"),
    "unknown grid": ({"grid": "logit"}, "unknown grid 'logit'; valid: uniform, quadratic"),
    "no image": ({"limit": 0}, r"limit \(=0\) must be"),
    "eta of nothing": ({"eta": 0.5}, r"eta \(=0.5\) is of ddim, which is none of samplers \(=heun"),
    "temperature of nothing": ({"temperature": 0.1}, r"temperature \(=0.1\) is of sde, which is"),
    "grid of nothing": ({"samplers": ("mean",), "grid": "quadratic"}, "is of times, which none of"),
    "two things": ({"status": True, "report_only": True}, "are two things to do; use one"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_flags_cannot_mean_is_refused_by_name(case):
    values, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        config(**values)


OF_DATA = {
    "smaller": ({"resolutions": (16,)}, r"resolutions \(=\[16\]\) must be at least 32"),
    "no pixel": ({"known_shares": (1e-5,)}, "keep no pixel of 32 x 32; use more"),
    "no step": ({"nfe": (1,)}, r"nfe \(=1\) is too little for heun, a step of which takes 2 calls"),
    "no step on an axis": ({"at_nfe": 1, "resolutions": (64,)}, r"at_nfe \(=1\) is too little for"),
    "more than there are": ({"asked": (821,)}, r"asked \(=\[821\]\) must be at most 820"),
}


@pytest.mark.parametrize("case", OF_DATA)
def test_what_the_data_do_not_have_is_refused_by_name(case):
    values, message = OF_DATA[case]
    with pytest.raises(ValueError, match=message):
        of_model(config(**values))


def test_images_are_taken_in_a_seeded_order_over_all_of_them():
    taken = order(1000)
    assert sorted(taken.tolist()) == list(range(1000))
    assert np.array_equal(taken, order(1000))
    # Of ten classes that lie one after the other, the first sixty images are of all.
    assert len({row // 100 for row in taken[:60].tolist()}) == 10


def test_images_are_grouped_by_their_size_alone():
    assert group_size(32, 32) == 32 and group_size(64, 64) == 8 and group_size(512, 512) == 1
    assert group_size(64, 32) == group_size(256, 32) == 1
