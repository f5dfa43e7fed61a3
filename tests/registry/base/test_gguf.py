"""A GGUF file as the base model of a registry: transformers de-quantises it, and its digest is the fingerprint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapters.config import BankConfig, TrainingConfig
from lorary.domains.base_model import load_base_model
from lorary.domains.errors import IncompatibleError
from lorary.registry import Registry
from lorary.registry.base.find import find_base
from lorary.registry.base.fingerprint import fingerprint

BANK = BankConfig(experts=1.0, rank=2)
TRAINING = TrainingConfig(steps=2, batch=2, block=16)
WIDTH, INNER, LAYERS, VOCABULARY = 32, 64, 2, 300


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights and a tokenizer of bytes."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(VOCABULARY)
    tokens = ["<pad>", "<s>", "</s>", *byte_alphabet(), "ab"]
    tokens += [f"w{i}" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (VOCABULARY - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, shape in shapes().items():
        generator = torch.Generator().manual_seed(len(name))
        values = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.2
        writer.add_tensor(f"{name}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_alphabet() -> list[str]:
    """The characters that stand for bytes in byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        found |= {f"blk.{i}.attn_norm": (WIDTH,), f"blk.{i}.ffn_norm": (WIDTH,)}
        found |= {f"blk.{i}.attn_q": (WIDTH, WIDTH), f"blk.{i}.attn_output": (WIDTH, WIDTH)}
        found |= {f"blk.{i}.attn_k": (16, WIDTH), f"blk.{i}.attn_v": (16, WIDTH)}
        found |= {f"blk.{i}.ffn_gate": (INNER, WIDTH), f"blk.{i}.ffn_up": (INNER, WIDTH)}
        found |= {f"blk.{i}.ffn_down": (WIDTH, INNER)}
    return found


def test_a_domain_is_added_and_composed_over_a_gguf_file(file: Path, tmp_path: Path) -> None:
    texts: list[Any] = [{"text": f"row {i} of text, {i * 7} words"} for i in range(30)]
    Registry.init(tmp_path / "store", base=str(file), data=texts, bank=BANK, training=TRAINING)
    registry = Registry.open(tmp_path / "store")

    registry.add_domain("numbers", data=texts, bank=BANK, training=TRAINING)

    answer = registry.generate(registry.compose("numbers"), "row 3", max_new_tokens=3)
    assert answer.new_tokens == 3


def test_a_loaded_file_is_an_ordinary_model(file: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base_model(file)
    ids = tokenizer("row 3 of text", return_tensors="pt").input_ids
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    again, _ = load_base_model(tmp_path)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_its_fingerprint_is_that_of_the_file_wherever_it_is(file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "other.GGUF"
    moved.write_bytes(file.read_bytes())
    record = fingerprint(find_base(str(file)), source=str(file))

    assert fingerprint(find_base(str(moved)), source=str(moved)) == record
    moved.write_bytes(file.read_bytes() + b"0")
    assert fingerprint(find_base(str(moved)), source=str(moved)).weights != record.weights


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04")

    with pytest.raises(IncompatibleError, match="is not a GGUF file"):
        fingerprint(find_base(str(path)), source=str(path))


def test_a_folder_with_a_gguf_file_alone_says_how_to_use_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    with pytest.raises(IncompatibleError, match="no safetensors") as caught:
        fingerprint(tmp_path, source=str(tmp_path))

    assert caught.value.fix == f"registry init --base {tmp_path / 'model.gguf'}"


def test_a_damaged_file_is_refused_in_three_lines(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))

    with pytest.raises(IncompatibleError, match=r"model\.gguf cannot be loaded") as caught:
        load_base_model(path)

    assert len(str(caught.value).splitlines()) == 3
