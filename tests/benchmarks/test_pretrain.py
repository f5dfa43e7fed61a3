"""The pretraining script of the pocket base, run for a few steps on a few sentences."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("pretrain.py")
WORDS = ["the river runs to the sea", "a king had three daughters", "rain fell on the town", "bread is made of flour"]


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    rows = [{"text": " and ".join(WORDS[i % 4 :] + WORDS[: i % 4]) * 40} for i in range(12)]
    for split in ("train", "validation"):
        with gzip.open(folder / f"general.{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "code.py").write_text("def f(x):\n    if x:\n        return x\n" * 20, encoding="utf-8")
    command = [sys.executable, str(SCRIPT), "--general", str(folder), "--steps", "3"]
    command += ["--tokenizer-text", str(folder / "code.py"), "--out", str(folder / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder / "out"


def test_pretraining_writes_an_ordinary_bfloat16_transformers_folder(pocket: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(pocket, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(pocket)

    assert model.dtype == torch.bfloat16
    ids = tokenizer("the river", return_tensors="pt").input_ids
    assert ids[0, 0].item() == tokenizer.bos_token_id
    assert torch.isfinite(model(ids).logits).all()


def test_pretraining_records_its_data_and_score(pocket: Path) -> None:
    record = json.loads((pocket / "pretraining.json").read_text(encoding="utf-8"))

    assert record["steps"] == 3
    assert record["tokens"] == 3 * 4096
    assert record["validation_bits_per_byte"] > 0
    assert [data["file"] for data in record["data"]] == ["general.train.jsonl.gz"]


def test_the_tokenizer_splits_digits_and_keeps_the_text(pocket: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pocket)
    text = "x = 1234\n        return x  # é"

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    assert tokenizer.decode(ids) == text
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4


def test_the_chat_template_marks_turns(pocket: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pocket)

    turn = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    assert text == "<|begin|><|user|>Hello<|end|><|assistant|>"
