"""Imports go one way: a wing may know only the wings below it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "mambaflow"
FILES = sorted(LIBRARY.rglob("*.py"))

# Who may import whom. The ground is what lies beside the wings in mambaflow/.
GROUND = {
    "config", "checks", "disk", "host", "lease", "local_storage", "run_paths", "s3_storage",
    "signals", "storage", "storage_base", "variables",
}  # fmt: skip
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "data": {"kernels"},
    "models": {"kernels"},
    "flow": set(),
    "report": set(),
    "evaluation": {"data", "flow", "models", "report"},
    "training": {"data", "evaluation", "flow", "models", "report"},
    "search": {"data", "evaluation", "models", "report", "training"},
    "distributed": {"data", "evaluation", "models", "report", "search", "training"},
    "launch": {"search", "distributed"},
    "benchmarks": {"kernels", "data", "models", "flow", "report", "evaluation", "training"},
}
# What the wings may import of the ground: kernels know numbers alone, and how they may be told to
# be others; flow nothing at all.
ON_GROUND = dict.fromkeys(ARROWS, GROUND) | {"kernels": {"variables"}, "flow": {"checks"}}
# Inside the ground.
BELOW = {
    "checks": set(), "variables": {"checks"}, "host": {"variables"},
    "storage_base": set(), "disk": {"storage_base"},
    "local_storage": {"disk", "storage_base"}, "s3_storage": {"disk", "storage_base", "variables"},
    "storage": {"local_storage", "s3_storage", "storage_base"},
    "lease": {"checks", "storage_base"},
    "config": {"checks"}, "signals": set(),
    "run_paths": {"checks", "config", "storage", "storage_base"},
}  # fmt: skip
ONLY = {
    "ray": {"distributed"},
    "boto3": {"s3_storage"},
    "botocore": {"s3_storage"},
    "submitit": {"launch"},
    "optuna": {"search"},
}
METRICS = ["calibration", "cost", "metrics", "quality", "scored_images", "speckle", "sums"]
TORCH_ALONE = ["flow/path", "flow/samplers", *(f"evaluation/{room}" for room in METRICS)]


def name(path: Path) -> str:
    return path.relative_to(LIBRARY).with_suffix("").as_posix()


def wing(room: str) -> str:
    return room.split("/")[0]


def imported(path: Path) -> set[str]:
    """Every name that a file imports, with what it takes from there, and at which depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The wings, and files of the ground, that a file imports."""
    parts = [n.split(".") for n in imported(path) if n.startswith("mambaflow.")]
    return {p[1] for p in parts} & (GROUND | set(ARROWS))


def rooms(path: Path) -> set[str]:
    """The files that a file imports."""
    parts = [n.split(".")[1:] for n in imported(path) if n.startswith("mambaflow.")]
    return {"/".join(p[:2]) for p in parts} & {name(f) for f in FILES}


def test_every_file_is_in_a_wing_or_on_the_ground():
    here = {wing(name(f)) for f in FILES}
    assert here == set(ARROWS) | GROUND | {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_imports_only_wings_below_its_own(path):
    mine = wing(name(path))
    if mine == "__init__":
        return  # the library's public names come from everywhere
    allowed = BELOW[mine] if mine in GROUND else ARROWS[mine] | ON_GROUND[mine] | {mine}
    assert ours(path) <= allowed, f"{name(path)} imports {ours(path) - allowed}"


def test_the_arrows_between_files_make_no_circle():
    above = {name(f): rooms(f) for f in FILES if f.stem != "__init__"}
    while free := {room for room, below in above.items() if not below & set(above)}:
        above = {room: below for room, below in above.items() if room not in free}
    assert not above, f"these import one another in a circle: {sorted(above)}"


def test_the_arrows_between_wings_make_no_circle():
    above = dict(ARROWS)
    while free := {one for one, below in above.items() if not below & set(above)}:
        above = {one: below for one, below in above.items() if one not in free}
    assert not above


@pytest.mark.parametrize("path", FILES, ids=name)
def test_services_are_known_to_one_wing_alone(path):
    top = {n.split(".")[0] for n in imported(path)}
    for package, allowed in ONLY.items():
        assert package not in top or wing(name(path)) in allowed, f"{name(path)}: {package}"
    assert not top & {"jobs", "cluster", "tune"}


@pytest.mark.parametrize("path", sorted((LIBRARY / "launch").glob("*.py")), ids=name)
def test_a_launcher_knows_of_ray_only_what_does_not_import_it(path):
    assert {room for room in rooms(path) if room.startswith("distributed/")} <= {
        "distributed/environment",
        "distributed/reaper",
    }


@pytest.mark.parametrize("room", TORCH_ALONE)
def test_flow_and_metrics_need_only_torch(room):
    names = {n.split(".")[0] for n in imported(LIBRARY / f"{room}.py")}
    assert names - {"mambaflow"} <= {"torch", "jaxtyping"} | sys.stdlib_module_names


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda p: p.stem)
def test_jobs_do_not_import_jobs_nor_touch_the_path(job):
    assert not {n for n in imported(job) if n.split(".")[0] in {"jobs", "tune", "cluster"}}
    assert "sys.path" not in job.read_text()


def test_no_script_is_named_like_a_package_that_it_would_hide():
    taken = {"ray", "torch", "tune", "submitit", "queue", "types", "mambaflow"}
    for folder in ("jobs", "cluster", "tune"):
        names = {p.stem for p in (ROOT / folder).glob("*.py")}
        assert not names & taken


def test_tests_stand_where_what_they_test_stands():
    wings = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name[0] not in "._"}
    # tests/slurm has a lab: what needs a batch system, of whichever wing.
    assert wings <= set(ARROWS) | {"jobs", "cluster", "tune", "slurm"}
