"""From your own text to a composed answer.

    python examples/own_data.py --store /tmp/my-registry
    python examples/own_data.py --store /tmp/my-registry --data notes.jsonl --name notes --prompt "..."

Creates a registry over the bundled pocket base, adds a built-in domain and one from a data file, and answers a prompt
with both composed. The file has one `{"text": ...}` per line; CSV, TSV, TXT and chat messages work too. The pocket base
is for demos: for readable answers use `--base` with a folder or a Hub id such as meta-llama/Llama-3.2-1B.
"""

import argparse
from pathlib import Path

from lorary.registry import BankConfig, Registry, TrainingConfig

SAMPLE = Path(__file__).parent / "beekeeping.jsonl"


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a new folder for the registry")
    parser.add_argument("--base", default="pocket", help="pocket, a folder or a Hub id")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="your text")
    parser.add_argument("--name", default="beekeeping", help="the domain's name")
    parser.add_argument("--prompt", default="The queen lays eggs in")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps per domain; chosen from the amount of text by default"
    )
    args = parser.parse_args()
    bank, training = BankConfig(rank=4), TrainingConfig(steps=args.steps)

    # once: fingerprints the base model and trains the bank of general text, which protects what the model can do
    registry = Registry.init(args.store, base=args.base, bank=bank, training=training)

    # each call trains new experts only, and proves that everything older is unchanged
    registry.add_domain("medicine", bank=bank, training=training)
    added = registry.add_domain(args.name, data=args.data, bank=bank, training=training)
    print(f"{args.name}: {added.scores.base:.3f} bits per byte with the base model, {added.scores.routed:.3f} routed")

    # a transformers model; the router decides for each token which domain it belongs to
    model = registry.compose(f"medicine+{args.name}")
    # continued as text; without `raw` the prompt is a user's turn of the base's chat template
    answer = registry.generate(model, args.prompt, max_new_tokens=32, raw=True)
    print(args.prompt + answer.text)
    print("route:", ", ".join(f"{slot} {weight:.2f}" for slot, weight in answer.route.items()))


if __name__ == "__main__":
    main()
