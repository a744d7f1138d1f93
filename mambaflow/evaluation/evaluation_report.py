"""The report of an evaluation, made of all rows that are kept: a table, numbers, a page, curves.

report/index.html    the page, which needs nothing else
report/table.md      the table of the terminal
report/summary.json  every number, for programs
tensorboard/         the sheets of images and the numbers, by TensorBoard
"""

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from mambaflow.checks import require
from mambaflow.evaluation.evaluate import status
from mambaflow.evaluation.evaluation_page import (
    ANSWERED,
    EvaluationPage,
    Failure,
    Picture,
    Pictures,
)
from mambaflow.evaluation.rows import KEY, Results, key_of
from mambaflow.evaluation.summary import Summary, Way
from mambaflow.report.page import render
from mambaflow.report.pictures import picture
from mambaflow.report.run_log import StoredRunLog
from mambaflow.report.tables import results_table

Request = Mapping[str, Any]
PAGE, TABLE, JSON = "report/index.html", "report/table.md", "report/summary.json"


def write_report(results: Results) -> str:
    """Make the report of every row at an address, and put it there; returns the table and where
    the page is.

    Raises:
        ResultsError: no evaluation was started there.
        ValueError: no row is there yet.
    """
    table, manifest = results.read(), results.manifest()
    require(
        table.num_rows > 0,
        f"out (={results.storage.uri}) holds no rows yet; start the evaluation first",
    )
    page = evaluation_page(results, table, manifest)
    ways = page.ways.plain or list(page.summary.entries)
    text = str(results_table(page.rows(ways), ANSWERED, page.about))
    summary = {
        "facts": dict(page.facts),
        "entries": [entry.json() for entry in page.summary.entries.values()],
    }
    results.storage.write(TABLE, text.encode())
    results.storage.write(JSON, (json.dumps(summary, indent=2) + "\n").encode())
    results.storage.write(PAGE, render(page.page()).encode())
    _log(results, page)
    return f"\n{text}\npage         {results.storage.uri}/{PAGE}"


def evaluation_page(
    results: Results, table: pa.Table, manifest: Mapping[str, Any]
) -> EvaluationPage:
    """What there is to show of the rows of an evaluation."""
    data, counts = manifest["data"], status(results)
    facts = _facts(results.requests(), manifest) | {"rows": str(counts)}
    missing = counts.asked - counts.done - counts.failed
    return EvaluationPage(
        Summary(table), _pictures(results, table), data["size"], data["known"],
        _about(results.requests(), manifest, table), facts, _failures(table), missing,
    )  # fmt: skip


def _facts(requests: Sequence[Request], manifest: Mapping[str, Any]) -> dict[str, str]:
    """What was measured, on what, by which commands, when."""
    data, lpips = manifest["data"], manifest["lpips"]
    return {
        "command": "; ".join(_commands(requests)),
        "data": f"{requests[0]['data']}, split {data['split']}, {_hash(data)}",
        "masks": f"{_masks(data)}, {data['known']} of {data['size'] ** 2} known",
        **{f"checkpoint {name}": f"weights {sha}" for name, sha in manifest["weights"].items()},
        "noise": "seed 0, by image and sample",
        "code": manifest["code"],
        "LPIPS": lpips if lpips == "none" else f"weights {lpips}",
        "device": manifest["device"],
        "date": _days(requests),
    }


def _about(requests: Sequence[Request], manifest: Mapping[str, Any], table: pa.Table) -> str:
    """The same as short as the caption of a table."""
    data, images = manifest["data"], len(set(table["image"].to_pylist()))
    weights = (f"{name} weights {sha}" for name, sha in manifest["weights"].items())
    return ", ".join(
        [*(f"`{command}`" for command in _commands(requests)), f"{images} images",
         f"data {_hash(data)}", f"masks {_masks(data)}", *weights, "seed 0",
         f"code {manifest['code']}", _days(requests)]
    )  # fmt: skip


# Results of earlier versions say which files the data were, and as what they were staged.


def _hash(data: Mapping[str, Any]) -> str:
    return f"hash {data['hash']}" if "hash" in data else f"shards {data['shards']}"


def _masks(data: Mapping[str, Any]) -> str:
    seed = data.get("mask seed")
    return f"staged as {data['staged as']}" if seed is None else f"of seed {seed}"


def _commands(requests: Sequence[Request]) -> list[str]:
    # Flags that came later add to those before: the rows are of all of them.
    ordered = sorted(requests, key=lambda request: (request["date"], request["command"]))
    return list(dict.fromkeys(request["command"] for request in ordered if request["command"]))


def _days(requests: Sequence[Request]) -> str:
    days = sorted(request["date"][:10] for request in requests)
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _failures(table: pa.Table) -> list[Failure]:
    """Of each way with rows that failed."""
    failed = table.select([*KEY, "error"]).filter(pc.not_equal(table["error"], ""))
    errors: dict[Way, list[str]] = defaultdict(list)
    for row in failed.to_pylist():
        errors[Way.of(key_of(row))].append(row["error"])
    return [Failure(way, len(found), found[0]) for way, found in sorted(errors.items())]


def _pictures(results: Results, table: pa.Table) -> Pictures:
    truth: dict[int, Picture] = {}
    known: dict[int, list[int]] = {}
    for row in results.truths():
        truth[row["image"]] = np.asarray(Image.open(io.BytesIO(row["truth"])).convert("RGB"))
        known[row["image"]] = row["known"]
    answers, deviations = {}, {}
    kept = table.filter(pc.is_valid(table["picture"])).drop_columns(
        ["scores", "fine", "reliability"]
    )
    for row in kept.to_pylist():
        key = key_of(row)
        answers[Way.of(key), key.image] = row["picture"]
        if row["deviation"] is not None:
            deviations[Way.of(key), key.image] = row["deviation"]
    return Pictures(truth, known, answers, deviations)


def _log(results: Results, page: EvaluationPage) -> None:
    """The same for TensorBoard: a sheet of images, and numbers under the names of the ways."""
    results.storage.delete_tree("tensorboard/")  # one report, made anew, and not a second line
    log = StoredRunLog(results.storage.child("tensorboard"), 0)
    try:
        images = list(page.pictures.truth)[:8]
        if images:
            columns = {k: np.stack(v) for k, v in page.columns(images).items()}
            log.image(0, "evaluation/answers", picture(columns))
        for way, entry in page.summary.entries.items():
            name = page.ways.label(way)
            log.scalars(0, {f"evaluation/{name}/{k}": v for k, v in _plain(entry.numbers)})
    finally:
        log.close()


def _plain(numbers: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    return ((key, value) for key, value in numbers.items() if not key.endswith("_se"))
