"""Configurations refuse what cannot run, and survive being written down."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from mambaflow.checks import lookup
from mambaflow.config import (
    ADDED,
    ARCHITECTURES,
    PARTS,
    RECIPES,
    RENAMED,
    ModelConfig,
    RunConfig,
    ScaleConfig,
    TrainConfig,
    differences,
    from_dict,
    from_json,
    mission,
    to_dict,
    to_json,
)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_recipe_survives_json(arch, recipe):
    config = RECIPES[recipe](arch)
    assert from_json(to_json(config)) == config


BAD = [
    (ModelConfig, {"d_model": 65}, r"d_model \(=65\) must be divisible .*; use 64 or 72"),
    (ModelConfig, {"num_layers": 7}, r"num_layers \(=7\) must be even .* use 8"),
    (ModelConfig, {"d_state": 0}, r"d_state \(=0\) must be positive"),
    (ModelConfig, {"scan": "joint"}, r"start \(='process'\) needs .* use start='plain'"),
    (ModelConfig, {"rgb_low": 1.0}, r"rgb_low \(=1.0\) must be a number below 1"),
    (ModelConfig, {"rgb_low": float("-inf")}, r"rgb_low \(=-inf\) must be a number below 1"),
    (ModelConfig, {"time_scale": float("nan")}, r"time_scale \(=nan\) must be positive"),
    (TrainConfig, {"epochs": 0}, r"epochs \(=0\) must be positive"),
    (TrainConfig, {"lr": -1.0}, r"lr \(=-1.0\) must be positive"),
    (TrainConfig, {"share_at_zero": 1.5}, r"share_at_zero \(=1.5\) must be in \[0, 1\]"),
    (TrainConfig, {"warmup_steps": -1}, r"warmup_steps \(=-1\) must not be negative"),
    (TrainConfig, {"seed": 2**32}, r"seed \(=4294967296\) must be in \[0, 2\^32\)"),
    (TrainConfig, {"min_queries": 9}, r"min_queries \(=9\) must be at most max_queries \(=0\)"),
    (ScaleConfig, {"num_workers": 0}, r"num_workers \(=0\) must be positive"),
    (ScaleConfig, {"min_workers": 2}, r"min_workers \(=2\) must be in \[0, num_workers \(=1\)\]"),
    (ScaleConfig, {"max_failures": -1}, r"max_failures \(=-1\) must not be negative"),
    (ScaleConfig, {"threads": -1}, r"threads \(=-1\) must not be negative"),
    (ScaleConfig, {"compile": "graphs"}, r"compile \(='graphs'\) needs a GPU; use --use-gpu, or"),
    (RunConfig, {"scale": ScaleConfig(compile="graphs", use_gpu=True),
                 "train": TrainConfig(min_queries=100, max_queries=300)},
     r"min_queries \(=100\) must be max_queries \(=300\); use --compile on, or --min-queries 300"),
    (RunConfig, {"train": TrainConfig(share_at_zero=0.0)},
     r"share_at_zero \(=0.0\) must be above 0 with start='process'.*; use 0.1, or start='gauss"),
    (RunConfig, {"arch": "v9"}, r"unknown arch 'v9'; valid: v1, v2"),
    (RunConfig, {"run_name": "a/b"}, r"run_name \(='a/b'\) must be a plain folder name"),
    (RunConfig, {"run_name": "a\r"}, r"run_name \(='a\\r'\) must be a plain folder name"),
    (RunConfig, {"run_name": "a\u200b"}, r"run_name \(='a\\u200b'\) must be a plain folder"),
    (RunConfig, {"run_name": ".."}, r"run_name \(='..'\) must be a plain folder name"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "values", "message"), BAD)
def test_bad_values_are_refused_with_name_rule_and_cure(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_a_batch_must_divide_among_every_number_of_workers_that_may_be():
    run = RunConfig(train=TrainConfig(batch_size=10))
    with pytest.raises(ValueError, match=r"batch_size \(=10\) .* world size \(=4\); use 8 or 12"):
        replace(run, scale=ScaleConfig(num_workers=4))
    with pytest.raises(ValueError, match=r"world size \(=3\)"):
        replace(run, scale=ScaleConfig(num_workers=5, min_workers=1))
    replace(run, scale=ScaleConfig(num_workers=2, min_workers=1))


def test_unknown_fields_and_names_are_refused_with_the_valid_ones():
    values = to_dict(RunConfig())
    values["model"]["d_modle"] = 3
    with pytest.raises(
        ValueError, match=r"unknown field\(s\) \['d_modle'\] in model; valid: .*d_model"
    ):
        from_dict(values)
    with pytest.raises(ValueError, match=r"unknown field\(s\) \['x'\] in a run"):
        from_dict({**to_dict(RunConfig()), "x": 1})
    with pytest.raises(ValueError, match="unknown recipe 'x'; valid: mission, first-run"):
        lookup(RECIPES, "x", "recipe")


def test_differences_name_the_field_and_both_values():
    old = RunConfig()
    new = replace(old, model=replace(old.model, d_model=128))
    assert list(differences(old, new)) == ["model.d_model: 256 -> 128"]


def parts(values: dict) -> dict[str, dict]:
    return {"a run": values, **{name: values[name] for name in PARTS}}


EVERY_FIELD = [
    (part, name) for part, fields in parts(to_dict(RunConfig())).items() for name in fields
]


@pytest.mark.parametrize(("part", "name"), [f for f in EVERY_FIELD if f[1] not in PARTS])
def test_a_missing_field_is_refused_or_means_what_it_meant_before_it_came(part, name):
    values = to_dict(mission("v1"))
    del parts(values)[part][name]
    if name in ADDED.get(part, {}):
        assert parts(to_dict(from_dict(values)))[part][name] == ADDED[part][name]
        return
    with pytest.raises(ValueError, match=rf"missing field\(s\) \['{name}'\] in {part}: .* use the"):
        from_dict(values)


@pytest.mark.parametrize("part", PARTS)
def test_a_configuration_without_a_part_is_refused(part):
    values = to_dict(RunConfig())
    del values[part]
    with pytest.raises(ValueError, match=rf"{part} \(=None\) must hold fields by name"):
        from_dict(values)


@pytest.mark.parametrize("part", RENAMED)
def test_a_field_by_its_earlier_name_is_that_field(part):
    for old, new in RENAMED[part].items():
        values = to_dict(mission("v1"))
        value = parts(values)[part].pop(new)
        parts(values)[part][old] = value
        assert from_dict(values) == mission("v1") and value != getattr(ModelConfig(), new)


WRONG_TYPES = [
    ("ModelConfig(d_model='256')", "d_model (='256') must be int, not str"),
    ("ModelConfig(d_model=256.0)", "d_model (=256.0) must be int, not float"),
    ("ModelConfig(d_model=True)", "d_model (=True) must be int, not bool"),
    ("ModelConfig(windows=1)", "windows (=1) must be bool, not int"),
    (
        "ModelConfig(scan='sideways')",
        "scan (='sideways') must be one of 'known', 'append', 'joint'",
    ),
    ("TrainConfig(lr='1e-4')", "lr (='1e-4') must be float, not str"),
    ("TrainConfig(masks=None)", "masks (=None) must be one of 'strict', 'fresh'"),
    ("RunConfig(data=3)", "data (=3) must be str, not int"),
    ("RunConfig(model=None)", "model (=None) must be ModelConfig, not NoneType"),
    ("from_json('[]')", "a run (=[]) must hold fields by name"),
    ("from_json('{\"model\": 3}')", "model (=3) must hold fields by name"),
    ("TrainConfig(lr=float('nan'))", "lr (=nan) must be positive; use a number above 0"),
    ("TrainConfig(lr=float('inf'))", "lr (=inf) must be positive; use a number above 0"),
    (
        "TrainConfig(weight_decay=float('inf'))",
        "weight_decay (=inf) must not be negative",
    ),
    ("TrainConfig(lr=1)", "accepted"),
]  # a whole number will do for a float

TOLD = """
import json, sys
from mambaflow.config import *
for made in json.loads(sys.argv[1]):
    try:
        eval(made)
        print("accepted")
    except ValueError as error:
        print(error)
"""


def test_a_value_of_another_type_is_refused_as_json_may_bring_it():
    """In a process of its own: here the shape checker of tests would speak first."""
    command = [sys.executable, "-c", TOLD, json.dumps([made for made, _ in WRONG_TYPES])]
    done = subprocess.run(command, capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert len(told) == len(WRONG_TYPES), done.stderr
    for (made, message), line in zip(WRONG_TYPES, told, strict=True):
        assert line.startswith(message), (made, line)
