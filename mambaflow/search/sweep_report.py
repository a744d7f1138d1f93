"""The report of a sweep, made from its ledger alone: a table, numbers, a page, the best trial.

report/index.html    the page, which needs nothing else
report/table.md      the table of the terminal
report/summary.json  every number, for programs
best.json            the best trial's configuration, for jobs/train.py --config

What an answer takes is measured on the trials' checkpoints, where these are still there.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from mambaflow.config import RunConfig, from_json, to_json
from mambaflow.report.page import render
from mambaflow.report.tables import provenance
from mambaflow.run_paths import RunPaths
from mambaflow.search.board import Board
from mambaflow.search.config import SweepConfig
from mambaflow.search.cost import MOST, time_answers
from mambaflow.search.findings import Findings
from mambaflow.search.ledger import Ledger
from mambaflow.search.opening import read_sweep
from mambaflow.search.sweep_page import SweepPage
from mambaflow.search.sweep_paths import SweepPaths


def write_report(paths: SweepPaths, timed: bool = True) -> str:
    """Make the report of what a ledger says by now, and put it there; returns the table and where
    page and best configuration are.

    Args:
        timed: measure seconds per image too, which takes the best trials' checkpoints and a minute
            or two.

    Raises:
        ValueError: no sweep was started there, or another version wrote it.
    """
    findings = read_findings(paths, timed)
    page = SweepPage(findings, _about(findings), _facts(findings))
    text = _text(page)
    summary = json.dumps(findings.json(), indent=2, allow_nan=False) + "\n"
    paths.folder.write(paths.TABLE, text.encode())
    paths.folder.write(paths.SUMMARY, summary.encode())
    paths.folder.write(paths.PAGE, render(page.page()).encode())
    uri = paths.folder.uri
    return f"\n{text}\npage         {uri}/{paths.PAGE}\n{_write_best(paths, findings)}"


def read_findings(paths: SweepPaths, timed: bool = False) -> Findings:
    """What the ledger of a sweep comes to.

    Raises:
        ValueError: no sweep was started there, or another version wrote it.
    """
    config = read_sweep(paths)
    board = Board.of(Ledger(paths.folder).events())
    findings = Findings(config, board)
    if not timed:
        return findings
    names = [trial.name for trial in findings.to_the_end]
    return replace(findings, timing=time_answers(paths, names[:MOST]))


def _text(page: SweepPage) -> str:
    """The ranking, what failed, and what the page says first, for a terminal and for Markdown."""
    every = (page.ranking(), page.staged(), page.failed())
    tables = [str(table) for table in every if table.rows]
    return "\n".join([*tables, f"{page.answer()} {page.progress()}\n"])


def _write_best(paths: SweepPaths, findings: Findings) -> str:
    """Put the best trial's configuration there; returns a line that says where."""
    best = findings.board.best
    if best is None:
        return "best.json    none: no proposed trial has spent its whole budget\n"
    folder = paths.trial(best.name)
    if not folder.exists(RunPaths.CONFIG):
        return f"best.json    none: {folder.uri} has no {RunPaths.CONFIG} any more\n"
    run, base = from_json(folder.read(RunPaths.CONFIG)), findings.config.run
    # Names and addresses were the trial's own. Its threads stay, though a run that has the machine
    # to itself could use more of them: with others its last bits, and figure, would be others.
    run = replace(run, run_name="", resume=False, command="", storage=base.storage)
    paths.folder.write(paths.BEST, to_json(run).encode())
    return f"best.json    {paths.folder.uri}/{paths.BEST}\n"


def _about(findings: Findings) -> str:
    """The caption of every table."""
    run, search = findings.config.run, findings.config.search
    command = "`; `".join(_commands(findings.board)) or "not started yet"
    return provenance(command, _data(run), run.train.seed, **{"search seed": search.search_seed},
                      date=_days(findings.board))  # fmt: skip


def _data(run: RunConfig) -> str:
    """Where the data are, and what they hold."""
    return f"{run.data} (hash {run.data_hash})" if run.data_hash else run.data


def _facts(findings: Findings) -> dict[str, str]:
    """What was searched, on what, by which commands, when."""
    config, board = findings.config, findings.board
    search, run = config.search, config.run
    stopping = f"ASHA, one in {search.reduction_factor} goes on from each rung"
    ended = f"{board.ended}: {board.cause}" if board.cause else board.ended
    return {
        "command": "; ".join(f"`{command}`" for command in _commands(board)) or "not started yet",
        "space": f"{search.space}, by {search.search} with seed {search.search_seed}",
        "base": f"{run.arch}, recipe {run.recipe}, seed {run.train.seed}",
        "budget": _budget(config),
        "stopping": stopping if search.scheduler == "asha" else "none is stopped early",
        "data": _data(run),
        "drivers": f"{board.starts}; the last: {ended}" if board.starts else "none yet",
        "date": _days(board),
    }


def _budget(config: SweepConfig) -> str:
    search, epochs = config.search, config.run.train.epochs
    amount = {
        "samples": f"samples of {epochs} epochs",
        "flops": f"the FLOPs that the base takes for {epochs} epochs",
        "seconds": f"{search.trial_minutes:g} minutes of training",
    }[search.budget]
    return f"{amount}, validated {search.validations} times"


def _commands(board: Board) -> Sequence[str]:
    return list(dict.fromkeys(command for command in board.commands if command))


def _days(board: Board) -> str:
    days = sorted(set(board.days))
    if not days:
        return "none yet"
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
