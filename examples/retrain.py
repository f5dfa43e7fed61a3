"""Update a domain with new text: a next version, accepted only if the old text is not forgotten.

    python examples/retrain.py --store /tmp/my-registry

Adds a domain from the first rows of a data file, retrains it on the others, prints the acceptance check and the
history, and shows that the first version is still there. Rows are passed as dictionaries: `data` takes a path, a list
of paths, rows, or a `datasets.Dataset`.
"""

import argparse
import json
from pathlib import Path

from lorary.registry import LoraryError, Registry, TrainingConfig

SAMPLE = Path(__file__).parent / "beekeeping.jsonl"


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a new folder for the registry")
    parser.add_argument("--base", default="pocket", help="pocket, a folder or a Hub id")
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each training run")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    old, new = rows[: len(rows) * 3 // 4], rows[len(rows) * 3 // 4 :]
    training = TrainingConfig(steps=args.steps)

    registry = Registry.init(args.store, base=args.base, training=training)
    first = registry.add_domain("beekeeping", data=old, training=training).manifest

    # new experts beside the old ones, which stay frozen; the router's statistics are updated in closed form
    retrained = registry.retrain("beekeeping", data=new, training=training)
    check = retrained.acceptance
    verdict = "accepted" if check.holds else "held back: latest still means the parent"
    print(f"on the parent's held-out text: {check.parent:.4f} -> {check.new:.4f} bits per byte, {verdict}")

    for entry in registry.log("beekeeping"):
        print(f"beekeeping@{entry.version}  {', '.join(entry.aliases):10}  {entry.digest}")
    assert registry.show("beekeeping@1") == first
    files = registry.verify("beekeeping@1", deep=True)
    print(f"beekeeping@1: {len(files)} files read, {sum(bool(file.problem) for file in files)} of them damaged")

    # an alias names a version for users of the registry; it can be moved back at any time
    registry.alias("beekeeping@1", "stable")
    try:
        registry.alias("beekeeping@9", "stable")
    except LoraryError as error:  # every error names its cause and a command that helps
        print(error)


if __name__ == "__main__":
    main()
