"""Sweeps that never ran: a folder with a ledger of events that are written by hand."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from mambaflow.config import RECIPES, to_json
from mambaflow.run_paths import RunPaths
from mambaflow.search.config import SearchConfig, SweepConfig
from mambaflow.search.config import to_json as sweep_to_json
from mambaflow.search.ledger import Event
from mambaflow.search.space import with_values
from mambaflow.search.sweep_paths import SweepPaths

COMMAND = "python tune/sweep.py --space size"
DAY = "2026-01-05"
WIDTHS = {32: -0.5, 64: 0.0, 128: 0.5}
LAYERS = {2: -0.1, 4: 0.0, 8: 0.1}
RATES = {2e-3: 0.0, 8e-3: -0.3}
SHARES = (1 / 9, 1 / 3, 1.0)
STEPS, BATCH = 900, 16


class Teller:
    """The events of one driver, with a clock of their own."""

    def __init__(self, wanted: int = 3, concurrent: int = 2, begin: float = 1000.0) -> None:
        self.clock, self.events = begin, list[Event]()
        self.tell("begin", wanted=wanted, concurrent=concurrent, command=COMMAND, day=DAY)

    def tell(self, what: str, after: float = 0.0, **values: Any) -> "Teller":
        self.clock += after
        self.events.append({"event": what, "time": self.clock, **values})
        return self

    def trial(
        self, name: str, values: dict, kind: str = "search", size: int = 10**6, label: str = ""
    ) -> "Teller":
        told = {"values": values, "kind": kind, "parameters": size, "steps": STEPS, "flops": 9e12,
                "label": label}  # fmt: skip
        return self.tell("trial", trial=name, **told)

    def start(self, name: str) -> "Teller":
        return self.tell("start", trial=name)

    def report(
        self, name: str, share: float, psnr: float, seconds: float, after: float = 0.0,
        decision: str = "continue",
    ) -> "Teller":  # fmt: skip
        step = round(share * STEPS)
        return self.tell(
            "report", after, trial=name, step=step, samples=step * BATCH, share=share,
            seconds=float(seconds), scores={"val/psnr": psnr, "val/psnr_se": 0.12},
            decision=decision,
        )  # fmt: skip

    def end(self, name: str, status: str = "finished", cause: str = "") -> "Teller":
        return self.tell("end", trial=name, status=status, cause=cause)


def at_share(final: float, share: float) -> float:
    """A learning curve that ends there."""
    return final + 1.5 * math.log10(share)


def run(teller: Teller, name: str, final: float, until: float = 1.0, cause: str = "") -> None:
    """A trial that trains 90 s for its whole budget, begins for 20 s, and saves for 2 s each time.

    Args:
        until: the share after which it is stopped.
        cause: of its failure after the first report.
    """
    teller.start(name)
    shares = [share for share in SHARES if share <= until]
    shares = shares[:1] if cause else shares
    for number, share in enumerate(shares):
        seconds, last = 90 * share, 90 * shares[number - 1] if number else 0.0
        stops = share == until < 1
        teller.report(name, share, at_share(final, share), seconds,
                      after=seconds - last + (2 if number else 20),
                      decision="stop" if stops else "continue")  # fmt: skip
    status = "failed" if cause else "stopped" if until < 1 else "finished"
    teller.end(name, status, cause)


def sweep(folder: Path, events: list[Event], configs: bool = True, **search: Any) -> SweepPaths:
    """A sweep's folder that holds these events, and the configurations of their trials."""
    base = replace(
        RECIPES["first-run"]("v2"), run_name="s", storage=str(folder), data=str(folder / "shards")
    )
    paths = SweepPaths.of(base)
    defaults = {"num_samples": 18, "validations": 9, "reduction_factor": 3}
    config = SweepConfig(search=SearchConfig(**{**defaults, **search}), run=base)
    paths.folder.write(paths.CONFIG, sweep_to_json(config).encode())
    lines = "".join(json.dumps(event) + "\n" for event in events)
    paths.folder.write("ledger/0001.jsonl", lines.encode())
    for event in events:
        if event["event"] == "trial" and configs:
            own = with_values(base, event["values"])
            own = replace(own, run_name=event["trial"], storage=paths.trials, resume=True,
                          command=COMMAND, scale=replace(own.scale, threads=1))  # fmt: skip
            paths.trial(event["trial"]).write(RunPaths.CONFIG, to_json(own).encode())
    return paths


def twenty(cause: str = "it broke") -> list[Event]:
    """18 proposed trials, widths by layers by two rates, and two of the base with other seeds.

    The base, 0008, has 23.0 dB, and its other runs 22.9 and 23.1: a noise of 0.1 dB. The best is
    0016 with 23.6 dB. 0000 and 0001 are stopped at the first rung, 0002 at the second, and 0017
    fails.
    """
    teller, number = Teller(18, 1), 0
    for (width, of_width), (layers, of_layers) in itertools.product(WIDTHS.items(), LAYERS.items()):
        for rate, of_rate in RATES.items():
            name, number = f"{number:04d}", number + 1
            values = {"model.d_model": width, "model.num_layers": layers, "train.lr": rate}
            teller.trial(name, values, size=width * width * layers * 12)
            final = 23 + of_width + of_layers + of_rate
            until = {"0000": SHARES[0], "0001": SHARES[0], "0002": SHARES[1]}.get(name, 1.0)
            run(teller, name, final, until, cause if name == "0017" else "")
    for seed, final in ((1, 22.9), (2, 23.1)):
        name = f"base-{seed}"
        teller.trial(name, {"train.seed": seed}, "seed", size=64 * 64 * 48)
        run(teller, name, final)
    return teller.tell("done", status="finished", cause="").events
