"""V1 against V2, the question of the project: does V2 remove the speckles, at which cost?

    python jobs/compare.py --v1 runs/A --v2 runs/B --out results/v1-v2

Runs jobs/evaluate.py with the flags that answer it, which it prints; more flags are passed on and
win over these: --data, --limit, --num-workers, … (jobs/evaluate.py --help; exit codes as there).
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

FLAGS = (
    "--samplers mean heun exponential sde ddim --nfe 2 10 20 50 100 --resolutions 64 "
    "--known-shares 0.05 0.1 0.2 0.5 --asked 204 512 --samples 4 "
    "--fills nearest linear thin-plate biharmonic"
).split()


def main() -> None:
    """Become jobs/evaluate.py, so that signals and exit codes are its own."""
    # No abbreviations: --v is nobody's, and --data would be found in --d.
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("v1", "v2"):
        parser.add_argument(f"--{name}", required=True, metavar="URI", help="a run or checkpoint")
    given, more = parser.parse_known_args()
    chosen = [flag for flag in more if flag.startswith("--")]
    flags = ["--checkpoint", f"V1={given.v1}", f"V2={given.v2}", *_without(FLAGS, chosen), *more]
    print(f"python jobs/evaluate.py {shlex.join(flags)}", flush=True)
    os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("evaluate.py")), *flags])


def _without(flags: list[str], chosen: list[str]) -> list[str]:
    """The flags, each with its values, but for those chosen otherwise."""
    kept, keep = [], True
    for word in flags:
        if word.startswith("--"):
            keep = word not in {flag.split("=")[0] for flag in chosen}
        if keep:
            kept.append(word)
    return kept


if __name__ == "__main__":
    main()
