"""Fail a CI job when a change makes the registry forget a domain: exit code 9.

    python examples/retention_in_ci.py --store my-registry --threshold "retention>=0.9"
    python examples/retention_in_ci.py --demo /tmp/demo --steps 40 --threshold "retention>=0.9"

The check itself is one command, which a workflow can call directly; retention.yml beside this file is such a workflow:

    registry report --store my-registry --gate "retention>=0.9"

--demo makes a small registry of two domains first, so that the script runs on its own. Scores are kept in the
registry's cache, so only what is new since the last run is measured.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from lorary.registry import Registry, TrainingConfig

MISSED = 9  # exit code: a threshold does not hold


def make_demo(folder: Path, *, base: str, steps: int) -> None:
    """Make a registry with two built-in domains."""
    registry = Registry.init(folder, base=base, training=TrainingConfig(steps=steps))
    for name in ("medicine", "legal"):
        registry.add_domain(name, training=TrainingConfig(steps=steps))


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--store", type=Path, help="an existing registry")
    where.add_argument("--demo", type=Path, metavar="FOLDER", help="make a registry here first")
    parser.add_argument("--base", default="pocket", help="base model of the demo: pocket, a folder or a Hub id")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps per domain of the demo")
    parser.add_argument("--threshold", action="append", default=[], help='such as "retention>=0.9"; repeat for several')
    parser.add_argument("--html", type=Path, help="write the report as a page, to keep as an artifact of the job")
    args = parser.parse_args()
    if args.demo:
        make_demo(args.demo, base=args.base, steps=args.steps)

    command = [sys.executable, "-m", "lorary.cli", "report", "--store", str(args.store or args.demo), "--no-questions"]
    command += [word for threshold in args.threshold or ["retention>=0.9"] for word in ("--gate", threshold)]
    command += ["--html", str(args.html)] if args.html else []
    code = subprocess.run(command, check=False).returncode
    if code == MISSED:
        print("a domain is retained less than the threshold allows: do not merge this change", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
