"""jobs/benchmark.py: what it prints is what it measured."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from small import FLAGS, staged

import jobs.benchmark as job
from mambaflow.benchmarks import (
    attention,
    loader,
    ray_cost,
    reference,
    sample,
    stall,
)
from mambaflow.benchmarks.bench import REFERENCE, BenchmarkConfig, against, race, random_batch
from mambaflow.config import ARCHITECTURES, TrainConfig
from mambaflow.flow.samplers import SOLVERS
from mambaflow.training.flops import step_flops

SMALL = ["--batch-size=1", "--queries=4", "--repeats=1"]
LOOP = """
import os

import torch
from core.words import GREETING

print(GREETING)


class MODEL(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 3)

    def forward(self, noisy, xy, t, known_xy, known_rgb):
        around = (known_rgb * known_xy.prod(-1, keepdim=True)).mean(1, keepdim=True)
        known = around.expand_as(noisy) * t.view(-1, 1, 1)
        return super().forward(torch.cat([noisy, xy, known], dim=-1))


def train_flow_matching(model, train_loader, test_loader, device="cuda", save_dir="saved"):
    os.makedirs(save_dir, exist_ok=True)
    print(next(iter(train_loader))["full_image"].shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for batch in train_loader:
        xy, rgb = batch["output_coords"].to(device), batch["output_values"].to(device)
        known = batch["input_coords"].to(device), batch["input_values"].to(device)
        loss = (model(0 * rgb, xy, torch.rand(len(xy)), *known) - rgb).pow(2).mean()
        loss.backward()
        optimizer.step()
"""


def test_rivals_take_turns_and_the_first_round_does_not_count(monkeypatch):
    order, clock = [], [0.0]
    costs = {"a": iter([50.0, 1, 2, 3]), "b": iter([70.0, 10, 20, 30])}

    def rival(name):
        def work():
            order.append(name)
            clock[0] += next(costs[name])

        return work

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert race({name: rival(name) for name in costs}, 3, "cpu") == {"a": 2, "b": 20}
    assert "".join(order) == "abababab"


def test_ratios_are_to_the_base():
    assert against({"a": 0.5, "b": 0.125}, "a") == [
        ["a", "500.00", "1.000"],
        ["b", "125.00", "0.250"],
    ]


SHORT, LONG = ["scan", "attention", "step", "loader"], ["sample", "stall"]


@pytest.mark.parametrize(
    "what", [*SHORT, *(pytest.param(what, marks=pytest.mark.slow) for what in LONG)]
)
def test_a_part_is_measured_and_written_as_it_is_printed(what, tmp_path, capsys):
    out, data = tmp_path / "numbers.json", str(staged(tmp_path))
    flags = ["--what", what, "--out", str(out), "--sizes", "16", "--steps", "2", "--data", data]
    flags += SMALL
    assert job.main(flags) == 0
    printed = capsys.readouterr().out
    tables = json.loads(out.read_text())
    for cell in (cell for table in tables for row in table["rows"] for cell in row):
        assert cell in printed
    measured = [float(row[-1].replace(",", "")) for row in tables[0]["rows"]]
    assert max(measured) > 0 and min(measured) >= 0
    assert (data if what in ("loader", "stall") else "made up") in printed.splitlines()[-1]
    if what == "step":
        flops = step_flops(ARCHITECTURES["v2"], TrainConfig(batch_size=1), 204, 4)
        assert dict(tables[0]["rows"])["FLOPs of a step, G"] == f"{flops / 1e9:.1f}"


def test_the_rivals_in_attention_answer_the_same():
    inputs = attention._inputs(BenchmarkConfig(), 2, 30)
    found = [rival(*inputs) for rival in attention.RIVALS.values()]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_measured_is_refused(capsys):
    assert job.main(["--what=loader", "--data=/nowhere", *SMALL]) == 2
    assert "manifest.json is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        job.main(["--what=nothing"])


def test_a_sampler_is_charged_for_every_call_it_makes():
    ways = sample.solvers(8)
    found = {name.split(",")[0]: sample.calls(solve) for name, solve in ways.items()}
    assert found == {solver.title: solver.calls(8) for solver in SOLVERS.values()}


def test_the_usual_way_gives_the_pixels_of_the_same_images(tmp_path):
    data = staged(tmp_path, full_images=True)
    shards = stall.ShardSet(str(data), "train")
    xy, rgb, asked_xy, asked_rgb = next(loader.per_item(shards, 5, 4))
    assert xy.shape == (4, shards.spec.known, 2) and asked_rgb.shape == (4, 5, 3)
    size = shards.spec.size
    whole = shards.rows(np.arange(len(shards))).images.reshape(-1, size, size, 3)
    place = (xy[0, 0] * size - 0.5).round().long()
    column = whole[:, place[1], place[0]] / 255
    assert np.isclose(column, rgb[0, 0].numpy(), atol=1e-6).all(-1).any()


def test_fetching_on_demand_differs_in_when_and_not_in_what(tmp_path):
    data = str(staged(tmp_path))
    ahead, late = (kind(data, "train") for kind in (stall.ShardSet, stall.OnDemand))
    late.expect(np.arange(len(late)))
    assert not late._fetcher._coming
    numbers = np.arange(len(late))[::-1].copy()
    assert np.array_equal(ahead.rows(numbers).rgb, late.rows(numbers).rgb)


def test_a_family_is_a_process_and_all_below_it():
    code = "import subprocess as s; p = s.Popen(['sleep', '9']); print(p.pid, flush=1); p.wait()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert {pid for pid, _ in ray_cost.family(parent.pid)} == {parent.pid, child}
        for pid in (child, parent.pid):
            ray_cost.os.kill(pid, ray_cost.signal.SIGKILL)


@pytest.mark.slow
def test_one_job_trains_at_a_time_and_its_rate_is_of_its_own_turn(tmp_path, monkeypatch):
    data = str(staged(tmp_path))
    ours = ("--epochs", "--log-every", "--eval-every", "--batch-size", "--no-ray")
    monkeypatch.setattr(ray_cost, "RECIPE", [f for f in FLAGS if not f.startswith(ours)])
    monkeypatch.setattr(ray_cost, "TURN_S", 1.0)
    config = BenchmarkConfig(data=data, batch_size=8)
    with (
        ray_cost.training("one", config, 1) as one,
        ray_cost.training("other", config, 1) as other,
    ):
        before = other.points()
        rate = one.turn()
        assert other.points() == before and one.process.poll() is None
        (first, a), (last, b) = one.points()[10], one.points()[-1]
        assert 0 < rate and other.turn() > 0 and b > a and last > first
    assert one.process.poll() is not None and other.process.poll() is not None


def test_a_job_that_does_not_begin_in_time_is_ended(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(ray_cost, "START_S", 0.0)
    monkeypatch.setattr(ray_cost, "END_S", 0.5)
    start = ray_cost.subprocess.Popen
    monkeypatch.setattr(
        ray_cost.subprocess, "Popen", lambda *a, **k: begun.append(start(*a, **k)) or begun[-1]
    )
    with (
        pytest.raises(RuntimeError, match="training did not begin"),
        ray_cost.training("bare", BenchmarkConfig(data=str(tmp_path)), 1),
    ):
        pass
    assert begun[0].poll() is not None


def test_a_job_that_cannot_begin_says_why(tmp_path):
    config = BenchmarkConfig(data=str(staged(tmp_path)), batch_size=8)
    with (
        pytest.raises(RuntimeError, match="training did not begin: .*max_queries"),
        ray_cost.training("bare", config, 1),
    ):
        pass


def checkout(folder, greeting="hello", loop=LOOP):
    """A stand-in for the reference repository: its names, not its code."""
    for arch, file in REFERENCE.items():
        path = folder / file
        path.parent.mkdir(parents=True)
        ahead = f"import sys\n\nsys.path.insert(0, {str(folder)!r})\n"
        path.write_text(ahead + loop.replace("MODEL", reference.MODEL[arch]))
    (folder / "core").mkdir()
    (folder / "core" / "__init__.py").touch()
    (folder / "core" / "words.py").write_text(f"GREETING = {greeting!r}\n")
    return folder


def racing(folder, arch="v2"):
    return ["--what=reference", f"--reference={folder}", f"--arch={arch}", *SMALL]


@pytest.mark.parametrize("arch", REFERENCE)
def test_the_reference_trains_from_its_folder_and_leaves_no_trace(arch, tmp_path, capsys):
    folder = checkout(tmp_path / "theirs")
    files, path = sorted(folder.rglob("*")), sys.path[:]
    assert job.main([*racing(folder, arch), "--precision=bf16"]) == 0
    assert sorted(folder.rglob("*")) == files and sys.path == path
    assert not {"core", "core.words", (folder / REFERENCE[arch]).stem} & set(sys.modules)
    printed = capsys.readouterr().out
    assert "hello" not in printed and "torch.Size" not in printed
    theirs, ours = (line.split("|") for line in printed.splitlines()[2:4])
    assert theirs[1].strip() == "reference" and theirs[2].strip() == "27"
    assert ours[1].strip() == "ours, bf16" and float(theirs[5]) == 1
    assert float(ours[5]) == pytest.approx(float(theirs[3]) / float(ours[3]), abs=0.01)
    assert f"{REFERENCE[arch]} of sha256" in printed


def test_one_checkout_is_not_taken_for_another(tmp_path, capsys):
    for greeting in ("one", "other"):
        reference.load(checkout(tmp_path / greeting, greeting), "v1")
        assert capsys.readouterr().out == f"{greeting}\n"


def test_the_loop_of_the_reference_stands_still_while_ours_trains():
    order = []
    config = BenchmarkConfig(batch_size=2, queries=4, repeats=2)
    batch = random_batch(config, config.queries)
    race_held = reference.Loader(batch, {"ours": lambda: order.append("ours")}, config)
    given = next(iter(race_held))  # for pictures
    with pytest.raises(reference.Over):
        for _ in race_held:
            order.append("theirs")
    assert order == ["theirs"] + 3 * ["theirs", "ours"]
    assert [len(times) for times in race_held.times.values()] == [2, 2]
    assert given["input_coords"].shape == (2, 204, 2) and given["output_values"].shape == (2, 4, 3)
    assert 0 <= given["input_values"].min() and given["output_values"].max() <= 1


@pytest.mark.parametrize(
    "loop, code, said",
    [
        ("import nowhere_to_be_found", 2, "No module named 'nowhere_to_be_found'; use a fresh"),
        (LOOP.replace("train_flow_matching", "learn"), 2, "no attribute 'train_flow_matching'"),
        (LOOP.replace("in train_loader", "in ()"), 1, "ended before the race; use a fresh"),
    ],
)
def test_a_reference_that_cannot_race_says_why(loop, code, said, tmp_path, capsys):
    assert job.main(racing(checkout(tmp_path / "theirs", loop=loop))) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arch", REFERENCE)
def test_a_folder_that_is_no_checkout_is_refused_with_the_way_to_get_one(arch, tmp_path):
    for folder in ("", "/nowhere", str(tmp_path)):
        with pytest.raises(ValueError, match=rf"reference \(='{folder}'\) .*{arch}.*git clone"):
            BenchmarkConfig(what="reference", arch=arch, reference=folder)
    BenchmarkConfig(what="step", reference="/nowhere")


def test_the_caption_names_the_commit_and_that_files_were_changed(tmp_path):
    folder = checkout(tmp_path / "theirs")
    assert reference.version(folder, "v2").startswith(f"{REFERENCE['v2']} of sha256 ")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True)
    said = reference.version(folder, "v2").removeprefix("commit ")
    assert len(said) >= 7 and head.startswith(said)
    (folder / "core" / "words.py").write_text("GREETING = 'changed'\n")
    assert reference.version(folder, "v2") == f"commit {said}-dirty"
