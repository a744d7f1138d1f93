"""cluster/ray.yaml and cluster/rayjob.yaml: what Ray, AWS and KubeRay take, without a cloud."""

import copy
import gzip
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from processes import wait_for
from small import FLAGS, staged

from cluster.begin_or_resume import main, to_start
from jobs.train import parse
from mambaflow.distributed.environment import set_ray_environment
from mambaflow.models.weights import saved_steps
from mambaflow.run_paths import RunPaths
from mambaflow.storage import at

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
AWS = FOLDER / "ray.yaml"
KUBE = FOLDER / "rayjob.yaml"
PROFILE = "arn:aws:iam::123456789012:instance-profile/"


def loaded(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def changed(value: dict, *path, to) -> dict:
    """A copy in which one thing is another."""
    value = copy.deepcopy(value)
    part = value
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = to
    return value


# --- the schema of a RayJob


def closed(schema):
    """The same schema, in which an object that names its fields has no others."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    # The names of fields are no keywords: what they hold are schemas again.
    out = {
        key: {name: closed(s) for name, s in part.items()}
        if key in ("properties", "$defs")
        else closed(part)
        for key, part in schema.items()
    }
    if "properties" in out and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


@pytest.fixture(scope="module")
def rayjob():
    """A validator of RayJobs."""
    packed = (Path(__file__).parent / "rayjob_schema.json.gz").read_bytes()
    return jsonschema.Draft202012Validator(closed(json.loads(gzip.decompress(packed))))


def head(job: dict) -> dict:
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def workers(job: dict) -> dict:
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


def test_the_manifest_is_a_rayjob_as_kuberay_defines_it(rayjob):
    job = loaded(KUBE)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert [e.message for e in rayjob.iter_errors(job)] == []


POD = ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec")
WRONG = {
    "a typo in the job": (("spec", "backOffLimit"), 5),
    "a typo in a pod": ((*POD, "restartpolicy"), "Never"),
    "a typo in a container": ((*POD, "containers", 0, "volumemounts"), []),
    "a typo deep in a list": ((*POD, "volumes", 0, "emptyDir", "size"), "2Gi"),
    "text for a number": (("spec", "backoffLimit"), "5"),
    "a number for text": (("spec", "rayClusterSpec", "rayVersion"), 2.6),
    "a number for a parameter": (
        ("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"),
        0,
    ),
    "a mode that there is not": (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
    "no quantity of memory": ((*POD, "containers", 0, "resources", "limits", "memory"), "8 GB"),
    "a container without a name": ((*POD, "containers", 0), {"image": "x"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_with_a_mistake_is_refused(rayjob, what):
    path, value = WRONG[what]
    assert list(rayjob.iter_errors(changed(loaded(KUBE), *path, to=value)))


def test_pods_have_room_for_shared_memory_and_the_secret_and_time_for_a_checkpoint():
    for spec in (head(loaded(KUBE)), workers(loaded(KUBE))["template"]["spec"]):
        (container,), (volume,) = spec["containers"], spec["volumes"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert container["envFrom"] == [{"secretRef": {"name": "mambaflow-s3"}}]
        # As long as `ray job stop` leaves, and more: the pod waits for the driver.
        stop = yaml.safe_load(loaded(KUBE)["spec"]["runtimeEnvYAML"])["env_vars"]
        assert spec["terminationGracePeriodSeconds"] > int(stop["RAY_JOB_STOP_WAIT_TIME_S"]) + 15
        assert container["lifecycle"]["preStop"] and spec["restartPolicy"] == "Never"


# --- the job that both files run


def of_kube() -> list[str]:
    python, again, script, *arguments = shlex.split(loaded(KUBE)["spec"]["entrypoint"])
    assert (python, again, script) == ("python", "cluster/begin_or_resume.py", "jobs/train.py")
    return arguments


def of_aws() -> list[str]:
    """From the comment at the file's top that says how a job is submitted."""
    text = re.sub(r"\\\n#\s+", "", AWS.read_text())
    (line,) = re.findall(r"ray job submit -- python jobs/train.py (.*)", text)
    return shlex.split(line)


@pytest.mark.parametrize("command", [of_kube, of_aws])
def test_the_job_of_both_files_is_one_that_train_takes_on_as_many_gpus_as_there_are(command):
    run = parse(command())
    scale = run.scale
    assert run.data.startswith("s3://") and run.storage.startswith("s3://") and run.run_name
    assert scale.use_gpu and scale.ray
    group = workers(loaded(KUBE))
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    node = loaded(AWS)["available_node_types"]["gpu"]  # one GPU: see the test on AWS below
    assert scale.min_workers == group["minReplicas"] == node["min_workers"]
    assert scale.num_workers == group["maxReplicas"] == group["replicas"] == node["max_workers"]
    assert loaded(AWS)["max_workers"] == node["max_workers"]


def test_a_flag_that_train_does_not_have_is_noticed():
    with pytest.raises(SystemExit):
        parse([*of_kube(), "--min-worker=2"])


def test_images_have_the_ray_and_the_python_of_the_constraints():
    constraints = (ROOT / "constraints.txt").read_text()
    ray = re.search(r"^ray==(\S+)$", constraints, re.M)[1]
    major, minor = re.search(r"CPython (\d+)\.(\d+)", constraints).groups()
    image = f"rayproject/ray:{ray}-py{major}{minor}"
    docker = loaded(AWS)["docker"]
    assert (docker["image"], docker["head_image"]) == (f"{image}-gpu", f"{image}-cpu")
    assert f"FROM {image}-gpu\n" in (FOLDER / "Dockerfile").read_text()
    assert loaded(KUBE)["spec"]["rayClusterSpec"]["rayVersion"] == ray


@pytest.mark.parametrize("path", [AWS, KUBE], ids=lambda p: p.name)
def test_what_must_be_changed_is_listed_at_the_top_and_nothing_else_is(path):
    top, _, rest = path.read_text().partition("\n\n") if path == AWS else (path.read_text(), "", "")
    if path == KUBE:
        top, _, rest = top.partition("apiVersion:")
    listed = set(re.findall(r"^#   (CHANGE-ME-[A-Z-]+)  ", top, re.M))
    used = {
        name
        for line in path.read_text().splitlines()
        if not line.startswith("#")
        for name in re.findall(r"CHANGE-ME-[A-Z-]*[A-Z]", line)
    }
    assert listed == used and listed


# --- Ray's cluster launcher


def ray_util():
    set_ray_environment()  # before Ray is imported, which this import does
    from ray.autoscaler._private import util

    return util


def test_the_cluster_file_is_one_that_ray_up_takes():
    util = ray_util()
    config = util.prepare_config(loaded(AWS))
    util.validate_config(config)
    assert config["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize(
    "path, value",
    [
        (("max_worker",), 4),
        (("docker", "images"), "x"),
        (("auth", "user"), "ubuntu"),
        (("available_node_types", "gpu", "min_workers"), "2"),
        (("available_node_types", "gpu", "min_workers"), 5),
        (("available_node_types", "head", "resources"), {"CPU": 0.5}),
        (("head_node_type",), "gpus"),
        (("setup_commands",), "pip install ."),
    ],
    ids=str,
)
def test_a_cluster_file_with_a_mistake_is_refused(path, value):
    util = ray_util()
    with pytest.raises((ValueError, TypeError, jsonschema.ValidationError)):
        util.validate_config(util.prepare_config(changed(loaded(AWS), *path, to=value)))


def test_what_the_cluster_file_sends_to_the_nodes_is_what_an_installation_needs():
    config = loaded(AWS)
    code = {k: v for k, v in config["file_mounts"].items() if k.startswith("/home/ray/mambaflow/")}
    assert all(k == f"/home/ray/mambaflow/{v}" and (ROOT / v).exists() for k, v in code.items())
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"packages = \[(.*)\]", project)[1].replace('"', "").split(", ")
    readme = re.search(r'readme = "(.*)"', project)[1]
    assert {*packages, readme, "pyproject.toml", "constraints.txt"} <= set(code.values())


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_nodes_state_how_they_authenticate_by_the_token_that_they_were_sent(kind):
    config = loaded(AWS)
    start = config[f"{kind}_start_ray_commands"][-1]
    (token,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", start)
    assert "RAY_AUTH_MODE=token" in start and token in config["file_mounts"]
    assert f"AWS_DEFAULT_REGION={config['provider']['region']}" in start
    if kind == "head":
        assert "RAY_JOB_STOP_WAIT_TIME_S=60" in start and "--dashboard-host=127.0.0.1" in start


ON_AWS = """
import json, sys, boto3, yaml
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.commands import _bootstrap_config

with mock_aws():
    ec2, iam = boto3.client("ec2"), boto3.client("iam")
    for name in ("HEAD", "WORKER"):
        iam.create_instance_profile(InstanceProfileName=name)
    text = sys.stdin.read().replace("CHANGE-ME-AMI", ec2.describe_images()["Images"][0]["ImageId"])
    config = _bootstrap_config(yaml.safe_load(text), no_config_cache=True)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind, node in config["available_node_types"].items():
        provider.create_node(node["node_config"], {"ray-user-node-type": kind}, 1)
    found = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    keys = ("InstanceType", "IamInstanceProfile", "InstanceLifecycle")
    resources = {k: v["resources"] for k, v in config["available_node_types"].items()}
    nodes = [{k: i.get(k) for k in keys} for i in found]
    print("FOUND", json.dumps({"nodes": nodes, "resources": resources}))
"""


@pytest.mark.s3
@pytest.mark.slow
def test_ray_up_brings_up_such_nodes_on_a_made_up_aws(tmp_path):
    text = AWS.read_text()
    for name in ("HEAD", "WORKER"):
        text = text.replace(f"CHANGE-ME-{name}-PROFILE", PROFILE + name)
    home = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "AWS_DEFAULT_REGION": "us-west-2"}
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    # A process of its own: the launcher leaves a key in the home folder.
    done = subprocess.run(
        [sys.executable, "-c", ON_AWS], input=text, capture_output=True, text=True, cwd=ROOT,
        env=home | keys, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(re.search(r"FOUND (.*)", done.stdout)[1])
    kinds = {
        n["IamInstanceProfile"]["Arn"]: (n["InstanceType"], n["InstanceLifecycle"])
        for n in found["nodes"]
    }
    assert kinds == {
        PROFILE + "HEAD": ("m7i.xlarge", None),
        PROFILE + "WORKER": ("g6.xlarge", "spot"),
    }
    # What AWS says of the kind: a worker has the one GPU that the job's --num-workers counts on.
    assert found["resources"]["gpu"]["GPU"] == 1 and found["resources"]["head"] == {"CPU": 0}


# --- a job that is given the same command again


def hook(spec: dict) -> list[str]:
    (container,) = spec["containers"]
    return container["lifecycle"]["preStop"]["exec"]["command"]


def begin(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "cluster/begin_or_resume.py", "jobs/train.py", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_head_that_is_evicted_has_the_run_save_and_the_same_command_goes_on(tmp_path):
    data, run = staged(tmp_path / "data"), at(tmp_path / "runs" / "mine")
    # Long enough to be met while it trains, and short once it is told how many epochs will do.
    here = [*FLAGS, f"--data={data}", f"--storage={tmp_path / 'runs'}", "--run-name=mine"]
    first = begin(*here, "--epochs=100000")
    wait_for(lambda: run.exists(RunPaths.METRICS))
    # The pod's processes are those of this one test: found by the driver's command line.
    only = hook(head(loaded(KUBE)))[2].replace("/proc/[0-9]*", f"/proc/{first.pid}")
    assert str(first.pid) in only
    subprocess.run(["/bin/bash", "-c", only.replace("sleep 15", "true")], check=True, timeout=120)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM, said
    saved = max(saved_steps(run))
    assert saved > 0
    again = begin(*here, f"--epochs={1 + saved * 8 // 40}")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "--resume" in said, said
    assert max(saved_steps(run)) > saved and run.exists(RunPaths.RESULTS)


def test_a_job_is_called_only_by_its_own_command_line():
    """The hook looks for a job by a pattern, and must not find who has the job's name among its
    arguments: the shell that started it, or the hook itself."""
    (pattern,) = re.findall(r"job='(.*)'", hook(head(loaded(KUBE)))[2])
    python = "/home/ray/anaconda3/bin/python"
    lines = {
        f"{python} -u /home/ray/mambaflow/jobs/train.py --arch v2 ": True,
        f"{python} -u /home/ray/mambaflow/tune/sweep.py --arch v2 ": True,
        "/bin/sh -c python cluster/begin_or_resume.py jobs/train.py --arch v2 ": False,
        f"{python} cluster/begin_or_resume.py jobs/train.py --arch v2 ": False,
        f"{python} -u /home/ray/ray/dashboard/dashboard.py --x=/jobs/y.py ": False,
        f"/bin/bash -c for process in /proc {python} -u /x/jobs/train.py ": False,
    }
    for line, found in lines.items():
        script = f"line={shlex.quote(line)} job={shlex.quote(pattern)}; [[ $line =~ $job ]]"
        assert (subprocess.run(["/bin/bash", "-c", script]).returncode == 0) == found, line


def test_a_worker_waits_for_the_process_that_trains():
    set_ray_environment()  # before Ray is imported, which this import does
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

    command = hook(workers(loaded(KUBE))["template"]["spec"])[2]
    (pattern,) = re.findall(r"grep -qs '(.*?)'", command)
    # Ray gives an actor's process the title ray::CLASS…; the hook's own line must not match.
    assert re.search(pattern, f"ray::{RayTrainWorker.__name__}.execute")
    assert not re.search(pattern, command)


def test_a_job_without_a_name_to_find_its_run_by_is_refused(capsys):
    assert main(["jobs/train.py", "--arch=v2"]) == 2
    assert "run_name (unset) must be given" in capsys.readouterr().err
    assert main(["jobs/none.py"]) == 2
    assert "must be a Python file that is there" in capsys.readouterr().err


def test_a_job_without_resume_is_started_as_it_is():
    assert str(to_start(["jobs/evaluate.py", "--out=x"])) == "jobs/evaluate.py --out=x"
