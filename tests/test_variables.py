"""Environment variables: read in one file, by stated rules, and refused by name before a start."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mambaflow import variables
from mambaflow.distributed.environment import (
    cluster_address,
    set_ray_environment,
    worker_environment,
)
from mambaflow.storage import at
from mambaflow.variables import RULES, TORCHRUN, Launched, check_variables, launched, stated

ROOT = Path(__file__).parents[1]
HERE = "mambaflow/variables.py"
FILES = [
    p for folder in ("mambaflow", "jobs", "tune", "cluster") for p in (ROOT / folder).rglob("*.py")
]
# Who hands all of the environment on, or reads what a batch system says of its own jobs.
HAND_ON = {
    "mambaflow/benchmarks/ray_cost.py", "mambaflow/distributed/reaper.py",
    "mambaflow/launch/attempt.py", "mambaflow/launch/command.py", "mambaflow/launch/node.py",
    "mambaflow/launch/doctor.py", "mambaflow/launch/ray_node.py", "mambaflow/launch/submission.py",
}  # fmt: skip
OTHERS = re.compile(r"SLURM\w*|SUBMITIT_\w+|CUDA_VISIBLE_DEVICES|PATH|MAMBAFLOW_ATTEMPT")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """None of the variables, and what a test's code sets is taken back."""
    for name in [n for n in os.environ if n in RULES or n.startswith(variables.FAMILIES)]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


# One file


def touches(tree: ast.AST) -> list[ast.AST]:
    """Every mention of the environment."""
    found = []
    for node in ast.walk(tree):
        named = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
        imported = isinstance(node, ast.ImportFrom) and node.module == "os"
        if named or (imported and {"environ", "getenv"} & {a.name for a in node.names}):
            found.append(node)
    return found


def literals(tree: ast.AST) -> set[str]:
    """Names that are asked of the environment, or of what stands for it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        keys: list[ast.expr] = []
        if isinstance(node, ast.Subscript):
            keys = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keys = node.args[:1] if node.func.attr in ("get", "setdefault", "pop", "getenv") else []
        elif isinstance(node, ast.Compare):
            keys = [node.left]
        for key in keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                found.add(key.value)
    return {name for name in found if re.fullmatch(r"[A-Z][A-Z0-9_]{2,}", name)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_other_file_reads_the_environment(path):
    name, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())
    if name == HERE:
        return
    assert not touches(tree) or name in HAND_ON, f"{name}: read it in {HERE}"
    if name in HAND_ON:
        ours = {n for n in literals(tree) if n in RULES or n.startswith(variables.FAMILIES)}
        assert not {n for n in ours if not OTHERS.fullmatch(n)}, f"{name} reads {ours}"


def test_every_variable_that_is_read_has_a_rule():
    asked = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("stated", "number", "seconds") and node.args:
                    if isinstance(node.args[0], ast.Constant):
                        asked.add(node.args[0].value)
    assert {"RAY_ADDRESS", "MAMBAFLOW_CORES", "CXX", "WORLD_SIZE"} <= asked <= set(RULES)


def test_the_readme_names_every_variable_of_ours():
    table = (ROOT / "mambaflow/training/README.md").read_text()
    assert [n for n in RULES if n.startswith("MAMBAFLOW_") and f"`{n}" not in table] == []


JOBS = ["jobs/train.py", "jobs/evaluate.py", "jobs/stage.py", "jobs/benchmark.py", "tune/sweep.py",
        "cluster/slurm.py"]  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_every_job_looks_at_its_variables_first(job):
    main = next(n for n in ast.parse((ROOT / job).read_text()).body
                if isinstance(n, ast.FunctionDef) and n.name == "main")  # fmt: skip
    first = next(n for n in ast.walk(main) if isinstance(n, ast.Try))
    assert ast.unparse(first.body[0]) == "check_variables()"


# Rules

BAD = {
    "MAMBAFLOW_THREADS": ["0", "-1", "2.5", "many", "\u0662", "1" * 9, " 2"],
    "MAMBAFLOW_CORES": ["none"],
    "MAMBAFLOW_GROWTH_S": ["soon", "-1", "1e3", "nan", "inf", "."],
    "MAMBAFLOW_SILENCE_S": ["4", "soon", "."],
    "MAMBAFLOW_NATIVE": ["false", "no", "2"],
    "MAMBAFLOW_ONEDNN": ["off"],
    "MAMBAFLOW_CACHE": [" /tmp/x"],
    "XDG_CACHE_HOME": ["cache", "/tmp/x "],
    "CXX": ["g++ "],
    "OMP_NUM_THREADS": ["0", "all", "2,", "-1"],
    "WORLD_SIZE": ["0", "two", "-1", "1.0"],
    "LOCAL_WORLD_SIZE": ["0"],
    "RANK": ["-1", "one"],
    "LOCAL_RANK": ["x"],
    "MASTER_ADDR": ["a b"],
    "MASTER_PORT": ["0", "65536", "port", "-1"],
    "RAY_ADDRESS": ["head", "head:port", "head:0", "head:70000", ":6379", "head: 6379", "a b:1",
                    "head:6379 ", " head:6379", "tcp://head:6379", "a,b:6379"],
    "RAY_AUTH_MODE": ["yes", "tokens"],
    "RAY_AUTH_TOKEN_PATH": [" /x"],
    "AWS_MAX_ATTEMPTS": ["0", "many", "\u0665"],
    "AWS_RETRY_MODE": ["patient"],
    "AWS_ENDPOINT_URL": ["localhost:9000", "ftp://x", "http://", "http://a b"],
    "AWS_ENDPOINT_URL_S3": ["x"],
    "AWS_REGION": ["us east 1"],
    "AWS_DEFAULT_REGION": ["us/east"],
    "AWS_REQUEST_CHECKSUM_CALCULATION": ["never"],
    "AWS_RESPONSE_CHECKSUM_VALIDATION": ["always"],
}  # fmt: skip
HIDDEN = {
    "RAY_AUTH_TOKEN": ["verysecret two"], "AWS_ACCESS_KEY_ID": ["verysecret "],
    "AWS_SECRET_ACCESS_KEY": [" verysecret"],
    "AWS_SESSION_TOKEN": ["a verysecret", "\u201cverysecret\u201d"],
    "RAY_JOB_CONFIG_JSON_ENV_VAR": [
        "verysecret", '["verysecret"]', '{"runtime_env": "verysecret"}',
        '{"runtime_env": {"env_vars": ["verysecret"]}}'],
}  # fmt: skip
GOOD = {
    "MAMBAFLOW_THREADS": ["1", "64"], "MAMBAFLOW_GROWTH_S": ["1", "0.5"],
    "MAMBAFLOW_SILENCE_S": ["5", "7.5"], "MAMBAFLOW_NATIVE": ["0", "1"], "CXX": ["ccache g++"],
    "MAMBAFLOW_CACHE": ["cache", "/tmp/my cache"], "OMP_NUM_THREADS": ["4", "4,2"],
    "RAY_ADDRESS": ["auto", "local", "10.0.0.1:6379", "head-0.ns.svc:6379", "[::1]:6379",
                    "http://head:8265", "https://head/", "ray://head:10001"],
    "RAY_AUTH_MODE": ["token", "disabled"], "AWS_ENDPOINT_URL": ["http://[::1]:9", "https://s3.x/y"],
    "RAY_JOB_CONFIG_JSON_ENV_VAR": ["{}", '{"runtime_env": {"env_vars": {"A": "b"}}}',
                                    '{"runtime_env": null}', '{"runtime_env": {"env_vars": null}}'],
    "AWS_RETRY_MODE": ["legacy", "standard", "adaptive"],
    "MASTER_ADDR": ["node-1.x", "fe80::1%eth0"], "MASTER_PORT": ["29500"],
}  # fmt: skip


def cases(table):
    return [(name, text) for name, texts in table.items() for text in texts]


@pytest.mark.parametrize(("name", "text"), cases(BAD) + [(n, "1\r") for n in BAD])
def test_a_bad_value_is_refused_by_name_rule_value_and_cure(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=rf"^{name} \(=.*\) must .*; .+") as refused:
        stated(name)
    assert repr(text) in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.parametrize(("name", "text"), cases(HIDDEN) + [(n, "verysecret\n") for n in HIDDEN])
def test_a_secret_is_refused_by_name_and_never_told(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=rf"^{name} \(of \d+ characters\) must ") as refused:
        check_variables()
    assert "verysecret" not in str(refused.value)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "RAY_ADDRESS"])
def test_a_name_and_a_password_in_an_address_are_refused_and_never_told(monkeypatch, name):
    monkeypatch.setenv(name, "http://me:verysecret@host:9000")
    with pytest.raises(ValueError, match=rf"^{name} \(=.*@host:9000'\) must ") as refused:
        check_variables()
    assert "verysecret" not in str(refused.value)


@pytest.mark.parametrize(("name", "text"), cases(GOOD))
def test_a_good_value_is_taken_as_it_is(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    assert stated(name) == text


def test_every_variable_has_cases():
    assert set(BAD) | set(HIDDEN) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_an_empty_variable_is_none(monkeypatch, name):
    monkeypatch.setenv(name, "")
    assert stated(name) == ""
    check_variables()
    assert launched() == Launched()


@pytest.mark.parametrize("name", ["AWS_PROFILE", "RAY_TRAIN_X", "TUNE_X", "MAMBAFLOW_NEW"])
def test_others_of_the_families_are_looked_at_too(monkeypatch, name):
    monkeypatch.setenv(name, "")
    check_variables()
    assert name not in os.environ, "another program would read it as a value"
    monkeypatch.setenv(name, "x\r")
    with pytest.raises(ValueError, match=rf"^{name} \(='x\\r'\) must not hold control characters"):
        check_variables()


def test_several_are_refused_at_one_go(monkeypatch):
    for name in ("MAMBAFLOW_CORES", "MAMBAFLOW_THREADS", "AWS_MAX_ATTEMPTS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "?")
    with pytest.raises(ValueError, match=r"AWS_MAX.*; MAMBAFLOW_C.*; MAMBAFLOW_T.*; and 1 more$"):
        check_variables()


@pytest.mark.s3
@pytest.mark.parametrize("name", [
    "AWS_PROFILE", "AWS_MAX_ATTEMPTS", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
])  # fmt: skip
def test_storage_takes_an_empty_variable_for_none(bucket, monkeypatch, name):
    monkeypatch.setenv(name, "")
    at(bucket).write("a", b"1")
    assert at(bucket).read("a") == b"1"


# torchrun

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
         "MASTER_ADDR": "head", "MASTER_PORT": "29500"}  # fmt: skip


def launch(monkeypatch, **changes: str) -> Launched:
    for name, text in (WHOLE | changes).items():
        monkeypatch.setenv(name, text)
    return launched()


def test_torchruns_words_are_taken_where_they_agree(monkeypatch):
    assert launched() == Launched(0, 1, 0, 1)
    assert launch(monkeypatch) == Launched(1, 4, 1, 2)
    assert launch(monkeypatch, LOCAL_RANK="", LOCAL_WORLD_SIZE="") == Launched(1, 4, 0, 1)


CONTRADICTIONS = {
    "a rank beyond the world": ({"RANK": "4"}, r"RANK \(='4'\) must be below WORLD_SIZE \(=4\)"),
    "a rank of a world that nobody states": (
        {"WORLD_SIZE": "", "LOCAL_WORLD_SIZE": "", "LOCAL_RANK": ""},
        r"RANK \(='1'\) must be below WORLD_SIZE \(=1\); start the processes by torchrun"),
    "no rank": ({"RANK": ""}, r"RANK \(unset\) must be set beside WORLD_SIZE \(=4\)"),
    "no address": ({"MASTER_ADDR": "", "MASTER_PORT": ""}, r"MASTER_ADDR, MASTER_PORT \(unset\)"),
    "a place beyond the node": (
        {"LOCAL_RANK": "2"}, r"LOCAL_RANK \(='2'\) must be below LOCAL_WORLD_SIZE \(=2\)"),
    "a node larger than the world": (
        {"LOCAL_WORLD_SIZE": "8"}, r"LOCAL_WORLD_SIZE \(='8'\) must be at most WORLD_SIZE \(=4\)"),
    "no number": ({"WORLD_SIZE": "4\r"}, r"WORLD_SIZE \(='4\\r'\) must .* not hold control"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_torchruns_words_are_refused_where_they_do_not_agree(monkeypatch, case):
    changes, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message):
        launch(monkeypatch, **changes)


# Ray


@pytest.mark.parametrize("text", ["1", "x\r", "-3"])
def test_ray_hears_nothing_of_torchruns_variables(monkeypatch, text):
    for name in TORCHRUN:
        monkeypatch.setenv(name, text)
    check_variables()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    set_ray_environment()
    assert not set(TORCHRUN) & set(os.environ)
    assert not set(TORCHRUN) & set(worker_environment("head:6379"))


def test_an_address_of_another_kind_is_refused_for_a_cluster(monkeypatch):
    for text in ("http://head:8265", "ray://head:10001"):
        monkeypatch.setenv("RAY_ADDRESS", text)
        with pytest.raises(ValueError, match="is where jobs are submitted"):
            cluster_address()
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert cluster_address() == "local"


def test_workers_get_no_empty_variable_and_none_twice(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "")
    monkeypatch.setenv("AWS_REGION", "here")
    monkeypatch.setenv("MAMBAFLOW_CORES", "2")
    job = {"runtime_env": {"env_vars": {"AWS_REGION": "there"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    given = worker_environment("head:6379")
    assert given["MAMBAFLOW_CORES"] == "2" and not {"AWS_PROFILE", "AWS_REGION"} & set(given)


def test_a_token_that_is_not_there_is_refused_by_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ValueError, match=r"RAY_AUTH_TOKEN_PATH \(='.*/token'\) must be a file"):
        set_ray_environment()
    (tmp_path / "token").write_text("x")
    set_ray_environment()


def test_an_empty_word_on_authentication_is_none(monkeypatch):
    """In a fresh process: this one may have Ray."""
    code = (
        "import os; from mambaflow.distributed.environment import set_ray_environment as s; s(); "
        "print(os.environ['RAY_AUTH_MODE'], len(os.environ['RAY_AUTH_TOKEN']))"
    )
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["token", "64"]


# Jobs

ENDS = [
    ("jobs/train.py", "RAY_ADDRESS", "10.0.0.1:6379\r"),
    ("jobs/train.py --no-ray", "WORLD_SIZE", "x"),
    ("jobs/train.py --no-ray", "RANK", "1"),
    ("jobs/evaluate.py --out no", "AWS_MAX_ATTEMPTS", "x"),
    ("jobs/stage.py --out no", "RAY_ADDRESS", "head"),
    ("tune/sweep.py", "MAMBAFLOW_GROWTH_S", "soon"),
    ("cluster/slurm.py status x", "MAMBAFLOW_SILENCE_S", "1"),
]


@pytest.mark.parametrize(("command", "name", "text"), ENDS, ids=lambda v: repr(v))
def test_a_job_refuses_a_bad_variable_with_code_2_and_writes_nothing(
    tmp_path, monkeypatch, command, name, text
):
    monkeypatch.setenv(name, text)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script, *flags = command.split()
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True,
                          text=True, cwd=tmp_path, timeout=170, check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"error: {name} (={text!r}) must " in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
