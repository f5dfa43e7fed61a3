"""The strict reader: what was altered is refused although every digest was made to agree."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from lorary.domains.errors import IncompatibleError, IntegrityError, LoraryError
from lorary.registry import Registry
from lorary.registry.learn.proof import digest_of_tensors
from lorary.registry.pack.check_pack import check_pack
from lorary.registry.pack.pack import read_pack
from lorary.registry.store.strict_json import canonical_json, parse_json

EXPERT, EXPERT_CONFIG = "experts/e1/adapter_model.safetensors", "experts/e1/adapter_config.json"
BANK, BANK_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROUTER, ROUTER_CONFIG = "router/router.safetensors", "router/router.json"
KEY = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Any]


def with_tensors(pack: Any, path: str, change: Change) -> Any:
    tensors = load(pack.files[path])
    changed = change(tensors)
    kept = tensors if changed is None else changed
    data = save({name: tensor.contiguous() for name, tensor in kept.items()}, metadata={"format": "pt"})
    return pack.with_files(**{path: data})


def with_json(pack: Any, path: str, **changes: Any) -> Any:
    document = parse_json(pack.files[path], source="test") | changes
    return pack.with_files(**{path: canonical_json({k: v for k, v in document.items() if v is not ...})})


def refusal(pack: Any) -> LoraryError:
    manifest, files = pack.sealed()
    with pytest.raises(LoraryError) as caught:
        check_pack(files, manifest)
    return caught.value


@pytest.mark.parametrize("name", ["general", "cooking", "sailing"])
def test_a_pack_that_was_made_here_passes_and_is_read_as_ever(name: str, whole: Registry, loose: Any) -> None:
    manifest, files = loose(name).sealed()

    found = check_pack(files, manifest)

    expected = read_pack(whole.store, whole.show(name))
    assert digest_of_tensors(found.bank.tensors()) == digest_of_tensors(expected.bank.tensors())
    assert torch.equal(found.prototypes, expected.prototypes)
    assert found.temperatures == expected.temperatures


def test_a_store_is_checked_in_the_same_way(whole: Registry) -> None:
    assert check_pack(whole.store, whole.show("sailing")).feature_layer == 1


# --- adapter_config.json of an expert and of the whole bank: what PEFT and vLLM would believe ---


@pytest.mark.parametrize("path", [EXPERT_CONFIG, BANK_CONFIG])
@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 800.0},
        {"lora_alpha": 8},
        {"r": 1},
        {"use_rslora": True},
        {"use_rslora": 1},
        {"use_dora": True},
        {"target_modules": ["q_proj"]},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [3]},
        {"layers_pattern": "blocks"},
        {"base_model_name_or_path": "evil/other-model"},
        {"revision": "0" * 40},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"fan_in_fan_out": "yes"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
        {"peft_type": "IA3"},
        {"inference_mode": False},
        {"rank_pattern": {"q_proj": 64}},
        {"r": ...},
        {"lora_alpha": ...},
    ],
    ids=str,
)
def test_an_altered_adapter_config_is_refused(path: str, change: dict[str, Any], loose: Any) -> None:
    error = refusal(with_json(loose(), path, **change))

    assert error.exit_code == 5
    assert next(iter(change)) in str(error.cause)


# --- tensors ---


def one_more(tensors: Tensors) -> None:
    tensors[KEY.replace("q_proj", "x_proj")] = torch.zeros(2, 32)


def another_prefix(tensors: Tensors) -> Tensors:
    return {name.replace("model.layers", "vision.layers"): tensor for name, tensor in tensors.items()}


def a_padded_number(tensors: Tensors) -> Tensors:
    return {name.replace("layers.2", "layers.02"): tensor for name, tensor in tensors.items()}


def narrower_numbers(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def whole_numbers(tensors: Tensors) -> Tensors:
    return {name: tensor.long() for name, tensor in tensors.items()}


def one_bit_of(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(9.0))

    return change


def without(name: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def huge(tensors: Tensors) -> None:
    tensors[KEY] *= 1e9


@pytest.mark.parametrize("path", [EXPERT, BANK])
@pytest.mark.parametrize(
    "change",
    [one_more, another_prefix, a_padded_number, narrower_numbers, whole_numbers, one_bit_of(KEY), without(KEY), huge],
    ids=["more", "prefix", "padded", "narrow", "whole", "bit", "less", "huge"],
)
def test_altered_tensors_are_refused_on_both_sides(path: str, change: Change, loose: Any) -> None:
    assert refusal(with_tensors(loose(), path, change)).exit_code == 5


def test_an_update_of_absurd_norm_is_refused_although_everything_agrees(loose: Any) -> None:
    pack = loose()
    for path in (EXPERT, BANK):
        pack = with_tensors(pack, path, lambda tensors: {n: t * 1e5 for n, t in tensors.items()})

    assert "norm" in str(refusal(pack).cause)


def set_to(name: str, value: Any) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = torch.as_tensor(value(tensors[name]) if callable(value) else value)

    return change


def written(index: Any, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


def only_diagonal(triangle: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(32, 32)
    return triangle.where(rows == columns, 0.0)


ROUTER_CHANGES = {
    "a tensor more": lambda tensors: tensors | {"statistics.more": torch.zeros(1)},
    "gates of a layer without experts": lambda t: t | {"layers.0.expert_gate": torch.zeros(1, 32)},
    "a vocabulary bomb": set_to("statistics.vocabulary", [1 << 40]),
    "a vocabulary of nothing": set_to("statistics.vocabulary", [0]),
    "two vocabularies": set_to("statistics.vocabulary", [300, 300]),
    "token ids out of order": set_to("statistics.token_ids", lambda t: t.flip(0)),
    "a token id twice": set_to("statistics.token_ids", lambda t: t.index_fill(0, torch.tensor([0, 1]), 9)),
    "a negative token id": set_to("statistics.token_ids", written(0, -1)),
    "a negative count": set_to("statistics.token_counts", written(0, -5)),
    "an empty count": set_to("statistics.token_counts", written(0, 0)),
    "counts that overflow": set_to("statistics.token_counts", lambda t: t.fill_(1 << 62)),
    "counts as fractions": set_to("statistics.token_counts", lambda t: t.double() + 0.5),
    "a count less": set_to("statistics.token_counts", lambda t: t[:-1]),
    "half a row": set_to("statistics.rows", torch.tensor([7.5], dtype=torch.float64)),
    "negative rows": set_to("statistics.rows", lambda t: -t),
    "rows as float32": set_to("statistics.rows", lambda t: t.float()),
    "sums as float32": set_to("statistics.feature_sum", lambda t: t.float()),
    "sums too large for their squares": set_to("statistics.feature_sum", lambda t: t * 1e6),
    "sums of no text": set_to("statistics.feature_sum", lambda t: t + 10 * t.norm()),
    "a negative square": set_to("statistics.feature_triangle", lambda t: -t),
    "squares that overflow": set_to("statistics.feature_triangle", lambda t: t * 1e30),
    "squares of no text": set_to("statistics.feature_triangle", only_diagonal),
    "a square less": set_to("statistics.feature_triangle", lambda t: t[:-1]),
    "squares as float64": set_to("statistics.feature_triangle", lambda t: t.double()),
    "squares of the first edition": lambda t: (
        without("statistics.feature_triangle")(t) | {"statistics.feature_outer": torch.eye(32, dtype=torch.float64)}
    ),
    "half a hashed row": set_to("statistics.hashed_rows", written(0, 7.5)),
    "a negative rest": set_to("statistics.hashed_rows", written(1, -1.0)),
    "a hashed row without its rest": set_to("statistics.hashed_rows", lambda t: t[:1]),
    "no hashed mean": without("statistics.hashed_mean"),
    "a hashed mean less": set_to("statistics.hashed_mean", lambda t: t[:-1]),
    "a hashed mean of no rows": set_to("statistics.hashed_mean", lambda t: t + 100),
    "a hashed mean as float64": set_to("statistics.hashed_mean", lambda t: t.double()),
    "huge factors": set_to("statistics.hashed_factors", lambda t: t + 1000),
    "factors as float32": set_to("statistics.hashed_factors", lambda t: t.float()),
    "more factors than eigenpairs": set_to("statistics.hashed_factors", lambda t: t[:1].repeat(129, 1)),
    "factors of other features": set_to("statistics.hashed_factors", lambda t: t[:, :-1]),
    "a prototype that is long": set_to("prototypes", lambda t: t * 2),
    "a prototype of zeros": set_to("prototypes", lambda t: t * 0),
    "prototypes as float64": set_to("prototypes", lambda t: t.double()),
    "no prototypes": set_to("prototypes", lambda t: t[:0]),
    "a prototype that is none": set_to("prototypes", lambda t: t[0]),
    "a huge expert gate": set_to("layers.2.expert_gate", lambda t: t * 1e9),
    "a huge rank gate": set_to("layers.2.rank_gate", lambda t: t + 1e9),
    "a negative mean gate": set_to("layers.2.mean_gate", lambda t: -t),
    "a large mean gate": set_to("layers.2.mean_gate", lambda t: t + 3),
    "another mean gate than the bank's": set_to("layers.2.mean_gate", lambda t: t * 0.5),
    "gates as whole numbers": set_to("layers.2.expert_gate", lambda t: t.long()),
    "gates as float64": set_to("layers.2.expert_gate", lambda t: t.double()),
    "a rank gate less": without("layers.2.mean_gate"),
}


@pytest.mark.parametrize("change", ROUTER_CHANGES.values(), ids=ROUTER_CHANGES)
def test_router_data_that_no_text_can_give_is_refused(change: Change, loose: Any) -> None:
    assert refusal(with_tensors(loose(), ROUTER, change)).exit_code == 5


@pytest.mark.parametrize(
    "change",
    [
        {"feature_layer": -1},
        {"feature_layer": 4},
        {"feature_layer": 1 << 62},
        {"feature_width": 0},
        {"feature_width": 31},
        {"features": 31},
        {"features": 1 << 40},
        {"tempers": {"token": 1e9, "hidden": 0.1, "ridge": 0.1}},
        {"tempers": {"token": 0.1, "hidden": True, "ridge": 0.1}},
        {"tempers": {"token": 0.1, "hidden": 0.1}},
        {"tempers": {"token": 0.1, "hidden": 0.1, "ridge": -0.1}},
        {"half_life": 0},
        {"half_life": None},
        {"half_life": True},
        {"half_life": 1e300},
        {"decoder_layers": "a b"},
        {"decoder_layers": "../../etc"},
        {"decoder_layers": None},
        {"decoder_layers": "transformer.h"},
        {"color": "red"},
        {"decoder_layers": ...},
    ],
    ids=str,
)
def test_an_altered_router_config_is_refused(change: dict[str, Any], loose: Any) -> None:
    assert refusal(with_json(loose(), ROUTER_CONFIG, **change)).exit_code == 5


def test_the_config_of_another_program_is_refused_as_such(loose: Any) -> None:
    assert isinstance(refusal(with_json(loose(), ROUTER_CONFIG, projection="sha256:0")), IncompatibleError)


# --- files ---


@pytest.mark.parametrize(
    "name",
    ["weights.bin", "model.pt", "data.pkl", "evil.py", "index.faiss", "experts/e7/adapter_config.json", "a.json"],
)
def test_a_file_that_no_pack_has_is_refused_even_if_it_is_listed(name: str, loose: Any) -> None:
    error = refusal(loose().with_files(**{name: b"{}"}))

    assert name in str(error.cause)
    assert error.exit_code == 5


@pytest.mark.parametrize("path", [EXPERT, EXPERT_CONFIG, BANK, BANK_CONFIG, ROUTER, ROUTER_CONFIG])
def test_a_file_that_is_not_there_is_refused(path: str, loose: Any) -> None:
    assert path in str(refusal(loose().with_files(**{path: None})).cause)


@pytest.mark.parametrize("path", [EXPERT_CONFIG, BANK_CONFIG, ROUTER_CONFIG])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"r": NaN}',
        b'{"r": 1, "r": 2}',
        b"\xff",
        b"[" * 100_000,
        b'{"r": 1e999}',
        b"9" * 9999,
    ],
    ids=range(10),
)
def test_a_file_that_is_no_json_object_is_refused(path: str, data: bytes, loose: Any) -> None:
    assert refusal(loose().with_files(**{path: data})).exit_code in (5, 6)


# --- the manifest ---


def assign(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value

    return change


MANIFEST_CHANGES = {
    "alpha": assign("experts", 0, "alpha", value=800.0),
    "alpha bomb": assign("experts", 0, "alpha", value=1e308),
    "rank": assign("experts", 0, "rank", value=4),
    "rank bomb": assign("experts", 0, "rank", value=1 << 62),
    "method": assign("experts", 0, "method", value="rslora"),
    "targets": assign("experts", 0, "targets", value=["q_proj"]),
    "layers": assign("experts", 0, "layers", value=[1, 2]),
    "layers twice": assign("experts", 0, "layers", value=[1, 1, 2, 3]),
    "layer bomb": assign("experts", 0, "layers", value=[1 << 62]),
    "parameters": assign("experts", 0, "parameters", value=1),
    "no experts": assign("experts", value=[]),
    "counts": assign("allocation", "counts", value=[1, 1, 2, 3]),
    "too few layers": assign("allocation", "counts", value=[0, 1]),
    "negative counts": assign("allocation", "counts", value=[0, 1, 2, 3, -1]),
    "no counts": assign("allocation", value={}),
    "counts that are text": assign("allocation", "counts", value="0123"),
    "a draft": assign("version", value=0),
    "base id": assign("base", "id", value="evil/other"),
    "base revision": assign("base", "revision", value="0" * 40),
    "nameless base": assign("base", "id", value=" "),
    "long text": assign("description", value="x" * 5000),
    "no time": assign("created", value="yesterday"),
    "scores that are text": assign("evaluation", "base", value="1.0"),
    "interval that is a number": assign("evaluation", "interval", value=3),
    "steps that are a list": assign("train", "steps", value=[1]),
    "data without rows": assign("train", "data", value={"files": ["a"]}),
    "settings that are text": assign("train", "settings", value="x"),
    "experts a layer in words": assign("train", "bank", value={"experts": "two"}),
    "lineage that is a list": assign("lineage", "preservation", value=[1]),
    "proof that is text": assign("proof", "frozen", value="yes"),
    "drift that is text": assign("proof", "drift", value={"domains": "many"}),
    "tools that are lists": assign("tool", "torch", value=[]),
    "a run elsewhere": assign("train", "run", value="../../../etc"),
    "an absolute run": assign("train", "run", value="/etc"),
    "a long list": assign("train", "losses", value=[0.5] * 200_000),
    "a long text in a record": assign("train", "note", value="x" * 5000),
}


@pytest.mark.parametrize("change", MANIFEST_CHANGES.values(), ids=MANIFEST_CHANGES)
def test_a_manifest_that_says_something_else_than_its_files_is_refused(change: Any, loose: Any) -> None:
    manifest, files = loose().with_manifest(change).sealed()

    with pytest.raises(IntegrityError) as caught:
        check_pack(files, manifest)

    assert len(str(caught.value)) < 2000


def test_what_nothing_else_depends_on_may_be_another(loose: Any) -> None:
    pack = loose().with_manifest(assign("name", value="baking")).with_manifest(assign("description", value="Cakes."))
    manifest, files = pack.sealed()

    assert check_pack(files, manifest)
    assert json.loads(manifest.to_json())["name"] == "baking"
