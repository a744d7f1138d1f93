"""Imports go one way; a room may know only what lies below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for p in (ROOT / "mambaflow").rglob("*.py") if p.stem != "__init__")
LIBRARY = {p.relative_to(ROOT / "mambaflow").with_suffix("").as_posix(): p for p in FILES}

# Each room above those it may import; rooms on one line may import one another's lines below.
LEVELS = [
    {
        "config",
        "native",
        "scan_operator",
        "products",
        "samplers",
        "metrics",
        "report",
        "baselines",
        "flow",
    },
    {"storage", "process", "native_scan", "native_attention", "native_words", "triton_scan"},
    {"randomness"},
    {"pixels", "sources"},
    {"shards", "attention", "ssm"},
    {"layers"},
    {"staging", "model", "shard_set"},
    {"columns"},
    {"batches"},
    {"training", "evaluation", "logbook"},
    {"checkpoint", "world"},
    {"stopwatch"},
    {"run"},
    {"distributed"},
    {"benchmarks/bench"},
    {"benchmarks/scan"},
    {
        f"benchmarks/{part}"
        for part in (
            "attention",
            "step",
            "sample",
            "loader",
            "stall",
            "memory",
            "ray_cost",
            "reference",
        )
    },
]
assert sum(map(len, LEVELS)) == len(set().union(*LEVELS))
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
ONLY = {"ray": {"distributed"}, "boto3": {"storage"}, "botocore": {"storage"}, "submitit": set()}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(names: set[str]) -> set[str]:
    parts = [n.split(".")[1:] for n in names if n.startswith("mambaflow.")]
    return {"/".join(p[:depth]) for p in parts for depth in (1, 2)} & set(LIBRARY)


@pytest.mark.parametrize("room", LIBRARY)
def test_a_room_imports_only_rooms_below_it(room):
    used = rooms(imported(LIBRARY[room]))
    wrong = {other for other in used if LEVEL[other] >= LEVEL[room]}
    assert not wrong, f"{room} imports {wrong}"


@pytest.mark.parametrize("room", LIBRARY)
def test_services_are_known_to_one_room_alone(room):
    top = {name.split(".")[0] for name in imported(LIBRARY[room])}
    for package, allowed in ONLY.items():
        assert package not in top or room in allowed, f"{room} imports {package}"
    assert not top & {"jobs", "cluster", "tune"}


def test_samplers_and_metrics_need_only_torch():
    for room in ("samplers", "metrics"):
        names = {n.split(".")[0] for n in imported(LIBRARY[room])}
        assert names <= {"torch", "jaxtyping", "math", "dataclasses", "collections", "typing"}


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda p: p.stem)
def test_jobs_do_not_import_jobs_nor_touch_the_path(job):
    assert not {n for n in imported(job) if n.split(".")[0] in {"jobs", "tune", "cluster"}}
    assert "sys.path" not in job.read_text()


def test_no_script_is_named_like_a_package_that_it_would_hide():
    taken = {"ray", "torch", "tune", "submitit", "queue", "types", "mambaflow"}
    for folder in ("jobs", "cluster", "tune"):
        names = {p.stem for p in (ROOT / folder).glob("*.py")}
        assert not names & taken
