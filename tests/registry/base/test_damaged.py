"""Base models with damaged, odd or contradictory files: one clear refusal, and no registry."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorary.domains.base_model import load_base_model
from lorary.domains.errors import IncompatibleError, LoraryError
from lorary.registry import Registry
from lorary.registry.base.fingerprint import fingerprint
from lorary.registry.store.manifest import BaseRecord, check_same_base

Change = Callable[[Path], Any]
Q = "model.layers.1.self_attn.q_proj.weight"
WEIGHTS = "model.safetensors"


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def apply(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def raw(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def written(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def values(name: str, **more: Any) -> Change:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | more), encoding="utf-8")

    return apply


def layer_more(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    more = {key.replace("layers.3", "layers.4"): value.clone() for key, value in weights.items() if "layers.3" in key}
    return weights | more


def in_parts(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {Q: "model-00002-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")


CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer_config.json", "generation_config.json"
# what says it, and the change; one of each kind, the others are in `MORE`
CASES: dict[str, tuple[str, Change]] = {
    "truncated weights": ("SafetensorError", raw(WEIGHTS, lambda data: data[: len(data) // 2])),
    "surplus bias": ("q_proj.bias", tensors(lambda t: t | {Q.replace("weight", "bias"): torch.ones(32)})),
    "surplus module": ("extra.weight", tensors(lambda t: t | {"model.layers.0.extra.weight": torch.ones(2, 2)})),
    "surplus layer": ("layers.4", tensors(layer_more)),
    "fewer layers": ("layers.3", values(CONFIG, num_hidden_layers=3)),
    "int8": ("stored as I8", tensors(lambda t: t | {Q: t[Q].mul(100).to(torch.int8)})),
    "nan": ("q_proj.weight has values from nan", tensors(lambda t: t | {Q: t[Q] * float("nan")})),
    "another size": ("(16, 32) in the file, (32, 32)", tensors(lambda t: t | {Q: torch.ones(16, 32)})),
    "odd config": ("hidden_size", values(CONFIG, hidden_size="x")),
    "nan in the config": ("logits", values(CONFIG, rms_norm_eps=float("nan"))),
    "unknown quantisation": ("no quantisation nope", values(CONFIG, quantization_config={"quant_method": "nope"})),
    "broken generation_config": ("generation_config.json", raw(GENERATION, lambda data: data[:20])),
    "odd generation_config": ("temperature", values(GENERATION, temperature="hot")),
    "broken tokenizer_config": ("tokenizer_config.json", raw(TOKENIZER, lambda data: data[:20])),
    "broken template": ("Expected an expression", written("chat_template.jinja", "{% for x in %}")),
    "token without embedding": ("'<new>' has the id 300", values(TOKENIZER, eos_token="<new>")),
}
MORE: dict[str, tuple[str, Change]] = {
    "no weights": ("SafetensorError", raw(WEIGHTS, lambda _: b"")),
    "garbled header": ("SafetensorError", raw(WEIGHTS, lambda data: data[:8] + b"\xff" * 50 + data[58:])),
    "surplus bias of the head": ("lm_head.bias", tensors(lambda t: t | {"lm_head.bias": torch.ones(300)})),
    "uint8": ("stored as U8", tensors(lambda t: {key: value.to(torch.uint8) for key, value in t.items()})),
    "complex": ("stored as C64", tensors(lambda t: t | {Q: t[Q].to(torch.complex64)})),
    "infinite": ("norm.weight", tensors(lambda t: t | {"model.norm.weight": t["model.norm.weight"] / 0})),
    "missing weight": ("such as " + Q, tensors(lambda t: {key: t[key] for key in t.keys() - {Q}})),
    "no heads": ("ZeroDivisionError", values(CONFIG, num_attention_heads=0)),
    "negative size": ("negative", values(CONFIG, hidden_size=-32)),
    "no layers": ("layers.0", values(CONFIG, num_hidden_layers=0)),
    "activation": ("nope", values(CONFIG, hidden_act="nope")),
    "kind": ("nope", values(CONFIG, model_type="nope")),
    "kinds": ("llama", values(CONFIG, model_type=["llama"])),
    "dtype": ("foo", values(CONFIG, dtype="foo")),
    "vocabulary": ("(7, 32) in the model", values(CONFIG, vocab_size=7, pad_token_id=0)),
    "rope": ("nope", values(CONFIG, rope_parameters={"rope_type": "nope"})),
    "text of a quantisation": ("str", values(CONFIG, quantization_config="x")),
    "text config": ("int", values(CONFIG, text_config=3)),
    "pad": ("Padding", values(CONFIG, pad_token_id=10**6)),
    "deep config": ("recursion", written(CONFIG, "[" * 100_000)),
    "truncated tokenizer": ("JSONDecodeError", raw("tokenizer.json", lambda data: data[:500])),
    "empty tokenizer": ("KeyError", written("tokenizer.json", "{}")),
    "list of settings": ("expected an object", written(TOKENIZER, "[]")),
    "end token": ("eos_token", values(TOKENIZER, eos_token=5)),
    "bytes as template": ("utf-8", lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{")),
    "special tokens": ("special_tokens_map.json", written("special_tokens_map.json", "{")),
    "added tokens": ("added_tokens.json", written("added_tokens.json", "{")),
    "list of generation values": ("expected an object", written(GENERATION, "[]")),
    "end token of generation": ("eos_token_id", values(GENERATION, eos_token_id="x")),
    "penalty": ("repetition_penalty", values(GENERATION, repetition_penalty=-1)),
    "missing part": ("model-00002-of-00002", in_parts),
    "other name": ("model.safetensors", lambda folder: (folder / WEIGHTS).rename(folder / "other.safetensors")),
}


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


@pytest.mark.own_failure(
    "a base model with surplus weights, integer weights without a quantisation, or a broken generation_config.json",
    before="loaded without them, as they are, and with defaults",
    now="refused by name before there is a registry, exit 6",
)
@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize(
    ("says", "change"),
    [
        *(pytest.param(*case, id=name) for name, case in CASES.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in MORE.items()),
    ],
)
def test_a_damaged_base_is_refused_before_there_is_a_registry(
    says: str, change: Change, folder: Path, tmp_path: Path, texts: Any, short_run: Any
) -> None:
    change(folder)

    with pytest.raises(LoraryError) as caught:
        Registry.init(tmp_path / "store", base=str(folder), data=[texts["general"]], **short_run())

    assert caught.value.exit_code in (2, 3, 6)
    assert says in str(caught.value.cause)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "change",
    [
        tensors(lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        tensors(lambda t: t | {"v_head.weight": torch.ones(4), "vision.layers.0.weight": torch.ones(2, 2)}),
        tensors(lambda t: {key: value.half() for key, value in t.items()}),
        values(GENERATION, temperature=0.7, unknown=3),
        lambda folder: (folder / GENERATION).unlink(),
    ],
    ids=["computed", "of no module", "float16", "unknown key", "no generation_config"],
)
def test_what_changes_no_number_is_accepted(change: Change, folder: Path) -> None:
    change(folder)

    assert load_base_model(folder)[0].num_parameters() > 0


# --- settings of the tokenizer are a part of the fingerprint ---


def record_of(folder: Path) -> BaseRecord:
    return fingerprint(folder, source=str(folder))


SETTINGS = {
    "end token": values(TOKENIZER, eos_token="<|user|>"),
    "begin token": values(TOKENIZER, add_bos_token=False),
    "more tokens": written("added_tokens.json", '{"<new>": 299}'),
    "special tokens": written("special_tokens_map.json", '{"eos_token": "<|user|>"}'),
}


@pytest.mark.own_failure(
    "another end token or added token in the tokenizer's configs",
    before="the same fingerprint",
    now="another base model, exit 6",
)
@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_another_setting_of_the_tokenizer_is_another_base(change: Change, folder: Path) -> None:
    before = record_of(folder)
    change(folder)
    after = record_of(folder)

    with pytest.raises(IncompatibleError, match="another base model") as caught:
        check_same_base(wanted=before, found=after, what="cooking@1")

    assert str(caught.value.cause).startswith("tokenizer_settings")
    # records of before the settings were read say nothing about them
    check_same_base(wanted=replace(before, tokenizer_settings=None), found=after, what="cooking@1")
    check_same_base(wanted=after, found=replace(before, tokenizer_settings=None), what="cooking@1")


@pytest.mark.parametrize(
    "change",
    [
        values(TOKENIZER, name_or_path="/somewhere", transformers_version="9.9", model_max_length=7),
        values(TOKENIZER, is_local=False, local_files_only=True, backend="tokenizers"),
    ],
)
def test_settings_that_change_no_token_are_accepted(change: Change, folder: Path) -> None:
    before = record_of(folder)
    change(folder)

    assert record_of(folder) == before
