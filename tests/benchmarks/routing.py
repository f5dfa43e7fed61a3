"""Routing benchmark: where the domain router sends prompts, running text and chats, and what it costs.

    python tests/benchmarks/routing.py --base BASE --data DATA --out RESULT.json [--only clinc,switch,chat,sizes]
    python tests/benchmarks/routing.py --only loss --store STORE --data DATA --out RESULT.json

    clinc     share of the test prompts of CLINC150's ten domains whose own slot is the largest, and its mean gate; the
              same of domains of 25 and 50 rows, and of other methods' routers (routing_clinc.py)
    switch    share of the positions that the right domain owns after text of another field (routing_switch.py)
    chat      share of everyday, medical, legal and banking questions that go where they belong, with and without the
              base's chat template (routing_chat.py)
    sizes     memory and build time of a router of 100 domains over a vocabulary of 152,000 (routing_sizes.py)
    loss      nats a token of a stored composition on streams that switch, against the right slot alone, by real forward
              passes (routing_loss.py)

The parts but the last measure statistics with the product's own functions and train nothing. Each part adds a table to
the result file, from which routing_page.py writes docs/benchmarks.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from routing_chat import measure_chat
from routing_clinc import measure_clinc
from routing_loss import measure_loss
from routing_sizes import DOMAINS, VOCABULARY, measure_sizes
from routing_switch import BEFORE, measure_mixed, measure_switch
from timing import report
from transformers.utils.logging import disable_progress_bar

from lorary.registry.base.find import find_base
from lorary.registry.base.load import LoadedBase

PARTS = ("clinc", "switch", "chat", "sizes", "loss")


def main() -> None:
    """Run the requested parts."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    disable_progress_bar()
    base = LoadedBase(find_base(arguments.base))
    for part in arguments.only:
        for title, rows in measure_part(part, base, arguments).items():
            report(title, rows, arguments.out, {"base": base.folder.name})


def measure_part(part: str, base: LoadedBase, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of one part, by title."""
    data, streams = arguments.data, arguments.streams
    if part == "clinc":
        return {"CLINC150: ten domains and KP, at the end of each prompt": measure_clinc(base, data, arguments.encoder)}
    if part == "switch":
        return {
            "The next 512 positions after text of another field": measure_switch(
                base, data, streams=streams, lengths=BEFORE[:1] if arguments.quick else BEFORE
            ),
            "Five sentences of one field, then a question of another": measure_mixed(base, data),
        }
    if part == "chat":
        return {"Questions to KP, medicine, legal and banking": measure_chat(base, data)}
    if part == "sizes":
        domains = 4 if arguments.quick else DOMAINS
        return {f"Router of {domains} domains, vocabulary {VOCABULARY:,}": measure_sizes(base.layout.width, domains)}
    return {"Nats a token over the last 384 tokens": measure_loss(arguments.store, data, streams=streams)}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pocket", help="`pocket`, or a folder")
    parser.add_argument("--data", type=Path, help="folder with medicine/lm.train.jsonl etc.")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[part for part in PARTS if part != "loss"])
    parser.add_argument("--store", type=Path, help="registry with the domains medicine and legal, for the part loss")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder, for LORAUTER in the part clinc")
    parser.add_argument("--streams", type=int, default=12, help="streams of each kind, in the parts switch and loss")
    parser.add_argument("--quick", action="store_true", help="few domains in sizes, and the shortest text in switch")
    parser.add_argument("--out", type=Path, help="result file, to which the tables are added")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.only) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; choose among {', '.join(PARTS)}")
    if arguments.data is None and set(arguments.only) != {"sizes"}:
        parser.error("--data is required to measure")
    if "loss" in arguments.only and arguments.store is None:
        parser.error("the part loss needs --store")
    return arguments


if __name__ == "__main__":
    main()
