"""Print how many files and functions of ours `add-domain` enters, on a tiny random base model.

    python tests/trip.py             the counts
    python tests/trip.py --files     and the functions of each file

Modules that are only imported do not count. Run it before and after moving code: a use case that passes fewer files is
easier to follow.
"""

import argparse
import inspect
import os
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lorary.registry

LAYERS = ("adapters", "cli", "domains", "registry")
SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|end|>"]
SHORT = ["--steps", "2", "--block", "64", "--batch", "2", "--rank", "2"]


def make_base(folder: Path) -> None:
    """Save a random Llama of four layers and a byte-level tokenizer, as in tests/conftest.py."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["The court finds that the tenant pays the rent."], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
    )
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 512}
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **shape, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names).save_pretrained(folder)


def command(*words: str) -> None:
    """Run a command of the program in this process."""
    from lorary.cli.app import main

    sys.argv = ["registry", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{words} ended with exit code {end.code}") from end


def trip(folder: Path) -> dict[str, set[str]]:
    """Return the functions that `add-domain` enters, by file."""
    make_base(folder / "base")
    data = folder / "rows.jsonl"
    rows = (f'{{"text": "The court of row {i} finds that the tenant pays rent number {i * i}."}}' for i in range(40))
    data.write_text("\n".join(rows))
    store = str(folder / "store")
    command("init", store, "--base", str(folder / "base"), "--data", str(data), *SHORT, "--json")
    entered: set[CodeType] = set()

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            entered.add(frame.f_code)

    sys.setprofile(note)
    threading.setprofile(note)
    try:
        command("add-domain", "legal", "--store", store, *SHORT)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    registry = lorary.registry.__file__
    assert registry is not None
    root = Path(registry).resolve().parents[1]
    found: dict[str, set[str]] = defaultdict(set)
    for code in entered:
        path = Path(code.co_filename)
        layer = path.resolve().relative_to(root).parts[0] if path.resolve().is_relative_to(root) else ""
        # no modules and class bodies, which run on import, nor comprehensions and lambdas, which belong to a function
        if layer in LAYERS and code.co_flags & inspect.CO_NEWLOCALS and not code.co_name.startswith("<"):
            found[path.resolve().relative_to(root).as_posix()].add(code.co_qualname)
    return found


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="print the functions of each file")
    wants_files = parser.parse_args().files
    with tempfile.TemporaryDirectory() as folder:
        found = trip(Path(folder))
    if wants_files:
        for path, functions in sorted(found.items()):
            print(f"{path}  {len(functions)}")
            print("".join(f"    {name}\n" for name in sorted(functions)), end="")
    print(f"add-domain enters {sum(map(len, found.values()))} functions in {len(found)} files")


if __name__ == "__main__":
    main()
