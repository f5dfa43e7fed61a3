"""Altered packs by the thousand: each is refused with an error of ours, or is a sound pack all the same.

A mutant is a stored pack after one to three alterations: of bytes, of JSON, of tensors and their headers, or of how the
files belong together. Digests are then made to agree, so that it reaches the checks behind them.

An accepted mutant is a wrong accept unless `audit`, which shares no code with the reader, finds that the files are as
their digests say, that configs, records and tensors of every expert agree, that the whole-bank adapter is the
concatenation of the experts, and that what was loaded are the numbers in the files.
"""

import hashlib
import json
import math
import random
import re
import resource
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lorary.domains.errors import LoraryError
from lorary.registry import Registry
from lorary.registry.pack.check_pack import check_pack
from lorary.registry.pack.pack import DomainPack
from lorary.registry.pack.pack_source import PackBytes
from lorary.registry.store.manifest import PackManifest

MAX_SECONDS, MAX_MEGABYTES = 2.0, 300
EVIL = [
    *(None, True, False, 0, -1, 1, 1 << 63, -(1 << 63), 1 << 40, 10**30, 0.5, -0.0, 1e308, 1e-320),
    *(math.nan, math.inf, "", "a", "\x1b[31mred", "\u202egnp.exe", "../../etc/passwd", "x" * 5000, "\ud800", "NaN"),
    *([], {}, [[]], [None], {"": {}}, {"a": 1}, ["a", "a"], [1 << 62], "=cmd()", "<script>", "- !!python/object"),
]
Files = dict[str, bytes]
Mutator = Callable[[random.Random, dict[str, Any], Files], None]


# --- alterations: of the manifest, a JSON value, and the files; in place ---


def some_bytes(draw: random.Random, manifest: dict[str, Any], files: Files) -> None:
    path = draw.choice(sorted(files))
    data = bytearray(files[path])
    at = draw.randrange(min(len(data), draw.choice([16, 400, 1 << 30])) or 1)
    match draw.randrange(5):
        case 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        case 1:
            del data[at : at + draw.choice([1, 4, 8, 1000])]
        case 2:
            data[at:at] = draw.randbytes(draw.choice([1, 4, 8, 1000]))
        case 3:
            data = data[:at]
        case _:
            data[at:at] = data[at : at + 64]
    files[path] = bytes(data)


def some_json(draw: random.Random, manifest: dict[str, Any], files: Files) -> None:
    path = draw.choice([name for name in sorted(files) if name.endswith(".json")])
    try:
        document = json.loads(files[path])
    except ValueError:
        return
    change_json(draw, document)
    files[path] = json.dumps(document, indent=draw.choice([2, None]), sort_keys=draw.random() < 0.8).encode()
    if draw.random() < 0.1:
        files[path] = files[path].replace(b"{", draw.choice([b'{"r": 2, ', b'{"r": NaN, ', b"[" * 99]), 1)


def some_manifest(draw: random.Random, manifest: dict[str, Any], files: Files) -> None:
    change_json(draw, manifest)


def change_json(draw: random.Random, document: Any) -> None:
    places = list(places_in(document))
    if not places:
        return
    # half of the time in what the reader understands, not in long lists of figures
    target, key = draw.choice(places if draw.random() < 0.5 else places[:40])
    match draw.randrange(6):
        case 0:
            del target[key]
        case 1 if isinstance(target, dict):
            target[draw.choice(["extra", "r", "files", "", "\x1b", key + " ", key.upper()])] = target.pop(key)
        case 2 if isinstance(target, dict):
            target[draw.choice(["use_dora", "more", "rank_pattern", "auto_mapping"])] = draw.choice(EVIL)
        case 3 if isinstance(target[key], int | float):
            target[key] = draw.choice([target[key] + 1, -target[key], target[key] * 100, float(target[key])])
        case 4 if isinstance(target, list):
            target.append(target[key])
        case _:
            target[key] = draw.choice(EVIL)


def places_in(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places_in(value[key])


def some_tensor(draw: random.Random, manifest: dict[str, Any], files: Files) -> None:
    path = draw.choice([name for name in sorted(files) if name.endswith(".safetensors")])
    try:
        tensors = load(files[path])
    except Exception:  # already broken by an alteration before
        return
    if tensors:
        change_tensor(draw, tensors, draw.choice(sorted(tensors)))
    files[path] = save({k: v.contiguous() for k, v in tensors.items()}, metadata={"format": "pt"})


def change_tensor(draw: random.Random, tensors: dict[str, torch.Tensor], name: str) -> None:
    tensor, other = tensors[name].clone(), draw.choice(sorted(tensors))
    match draw.randrange(9):
        case 0:
            del tensors[name]
        case 1:
            tensors[draw.choice(["more", name + ".x", name.replace("2", "02"), name.replace("q_", "z_")])] = tensor
        case 2 if tensor.numel():
            values = [0, 1, -1, 100] + [math.nan, math.inf, 1e30] * tensor.is_floating_point()
            tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice(values)
            tensors[name] = tensor
        case 3:
            tensors[name] = tensor * draw.choice([0, -1, 2, 1e6, 1.0000001])
        case 4:
            tensors[name] = tensor.to(
                draw.choice([torch.float64, torch.float32, torch.float16, torch.int64, torch.int8])
            )
        case 5:
            tensors[name] = draw.choice(
                [tensor.flatten(), tensor.unsqueeze(0), tensor[:-1], tensor.mT if tensor.ndim > 1 else tensor]
            )
        case 6:
            tensors[name], tensors[other] = tensors[other].clone(), tensor
        case 7 if tensor.ndim:
            tensors[name] = torch.cat([tensor, tensor[:1]])
        case _:
            tensors[name] = tensor.flip(0) if tensor.ndim else tensor + 1


def some_header(draw: random.Random, manifest: dict[str, Any], files: Files) -> None:
    path = draw.choice([name for name in sorted(files) if name.endswith(".safetensors")])
    data = files[path]
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return
    change_json(draw, header)
    text = json.dumps(header).encode() + b" " * draw.choice([0, 0, 7, 1 << 21])
    claimed = draw.choice([len(text)] * 8 + [0, len(text) + 1, 1 << 40, (1 << 64) - 1])
    files[path] = struct.pack("<Q", claimed) + text + data[8 + length :]


def files_among_themselves(draw: random.Random, manifest: dict[str, Any], files: Files) -> None:
    one, other = draw.choice(sorted(files)), draw.choice(sorted(files))
    match draw.randrange(4):
        case 0:
            files[one], files[other] = files[other], files[one]
        case 1:
            files[one] = files[other]
        case 2:
            del files[one]
        case _:
            files[draw.choice(["x.bin", "evil.py", one + ".pkl", "experts/e9/adapter_config.json", "README.md"])] = (
                files[one]
            )


def the_same_lie_everywhere(draw: random.Random, manifest: dict[str, Any], files: Files) -> None:
    """What an attacker who knows the format does: record and config agree; the whole-bank adapter is forgotten."""
    experts = manifest.get("experts")
    expert = draw.choice(experts) if isinstance(experts, list) and experts else None
    path = f"experts/{expert.get('id')}/adapter_config.json" if isinstance(expert, dict) else ""
    if not isinstance(expert, dict) or path not in files:
        return
    key, alias, value = draw.choice(
        [
            ("alpha", "lora_alpha", draw.choice([800.0, 1e-9, 16.0])),
            ("rank", "r", draw.choice([1, 3, 64])),
            ("targets", "target_modules", draw.choice([["q_proj"], ["q_proj", "z_proj"]])),
            ("layers", "layers_to_transform", draw.choice([[3], [0, 1, 2, 3], [99]])),
        ]
    )
    try:
        config = json.loads(files[path])
        config[alias] = expert[key] = value
    except (ValueError, TypeError):
        return
    files[path] = json.dumps(config, sort_keys=True, indent=2).encode() + b"\n"


MUTATORS: list[Mutator] = [
    some_bytes,
    some_json,
    some_manifest,
    some_tensor,
    some_header,
    files_among_themselves,
    the_same_lie_everywhere,
]


def mutant(seed: int, pack: Any) -> tuple[bytes, Files]:
    """Manifest and files; the manifest's digests are those of the files."""
    draw = random.Random(seed)
    manifest, files = json.loads(json.dumps(pack.manifest)), dict(pack.files)
    kinds = {file["path"]: file["kind"] for file in manifest.pop("files")}
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        draw.choice(MUTATORS)(draw, manifest, files)
    listed = [
        {"path": p, "size": len(d), "sha256": f"sha256:{hashlib.sha256(d).hexdigest()}", "kind": kinds.get(p, "router")}
        for p, d in files.items()
    ]
    if isinstance(manifest, dict) and "files" not in manifest:
        manifest["files"] = listed
    return json.dumps(manifest).encode("utf-8", "surrogatepass"), files


# --- the audit of what was accepted ---

KEY = re.compile(r"base_model\.model\.model\.layers\.(\d)\.([a-z_.]+)\.lora_([AB])\.weight")


def audit(data: bytes, files: Files, pack: DomainPack) -> None:
    manifest = json.loads(data)
    listed = {file["path"]: file for file in manifest["files"]}
    assert listed.keys() == files.keys()
    for path, content in files.items():
        assert listed[path]["sha256"] == "sha256:" + hashlib.sha256(content).hexdigest()
        assert listed[path]["size"] == len(content)
    numbers = {
        p: {n: t.double().numpy() for n, t in load(d).items()} for p, d in files.items() if p.endswith("tensors")
    }
    router = numbers["router/router.safetensors"]
    parts: dict[tuple[int, str, str], list[np.ndarray]] = {}
    for expert in manifest["experts"]:
        audit_expert(manifest, expert, json.loads(files[f"experts/{expert['id']}/adapter_config.json"]))
        for name, tensor in numbers[f"experts/{expert['id']}/adapter_model.safetensors"].items():
            layer, target, letter = re.fullmatch(KEY, name).groups()  # type: ignore[union-attr]
            assert target.split(".")[-1] in expert["targets"]
            assert int(layer) in expert["layers"]
            assert tensor.shape[0 if letter == "A" else 1] == expert["rank"]
            scale = expert["alpha"] / (expert["rank"] ** (0.5 if expert["method"] == "rslora" else 1))
            parts.setdefault((int(layer), target, letter), []).append(tensor)
            parts.setdefault((int(layer), target, "scale"), []).extend(
                [np.full(expert["rank"], scale)] * (letter == "A")
            )
    bank = numbers["adapter_model.safetensors"]
    assert len(bank) == sum(letter != "scale" for _, _, letter in parts)
    for (layer, target, letter), pieces in parts.items():
        if letter == "scale":
            continue
        together = np.concatenate(pieces, axis=0 if letter == "A" else 1)
        loaded = (pack.bank.layers[layer].A if letter == "A" else pack.bank.layers[layer].B)[target]
        assert np.array_equal(loaded.double().numpy(), together)
        gate = np.concatenate(parts[layer, target, "scale"]) * router[f"layers.{layer}.mean_gate"]
        expected = together if letter == "A" else together * gate
        found = bank[f"base_model.model.model.layers.{layer}.{target}.lora_{letter}.weight"]
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-30)
    audit_router(router, pack)


def audit_expert(manifest: dict[str, Any], expert: dict[str, Any], config: dict[str, Any]) -> None:
    assert (config["r"], config["lora_alpha"]) == (expert["rank"], expert["alpha"])
    assert config["use_rslora"] == (expert["method"] == "rslora")
    assert config["target_modules"] == expert["targets"]
    assert config["layers_to_transform"] == expert["layers"]
    assert config["base_model_name_or_path"] == manifest["base"]["id"]
    assert config["revision"] == manifest["base"]["revision"]
    assert not {"use_dora", "rank_pattern", "auto_mapping", "modules_to_save"} & config.keys()


def audit_router(router: dict[str, np.ndarray], pack: DomainPack) -> None:
    assert np.allclose(np.linalg.norm(router["prototypes"], axis=1), 1, atol=1e-2)
    counts = np.zeros(int(router["statistics.vocabulary"].item()))
    counts[router["statistics.token_ids"].astype(int)] = router["statistics.token_counts"]
    assert counts.min() >= 0
    assert np.array_equal(pack.statistics.token_counts.numpy(), counts)
    rows, outer = router["statistics.rows"].item(), pack.statistics.feature_outer.numpy()
    assert np.array_equal(outer[np.triu_indices(len(outer))], router["statistics.feature_triangle"].astype(float))
    assert np.array_equal(outer, outer.T)
    factors = router["statistics.hashed_factors"].astype(float)
    assert np.square(factors).sum() < 1e5
    assert router["statistics.hashed_rows"].min() >= 0
    assert np.linalg.eigvalsh(outer / max(rows, 1)).min() > -1e-3
    for index, layer in pack.bank.layers.items():
        assert np.array_equal(layer.expert_gate.double().numpy(), router[f"layers.{index}.expert_gate"])


# --- the tests ---


def judged(data: bytes, files: Files) -> LoraryError | tuple[PackManifest, DomainPack]:
    try:
        manifest = PackManifest.from_json(data, source="mutant")
        return manifest, check_pack(PackBytes(files), manifest)
    except LoraryError as error:
        return error


@pytest.fixture(scope="module")
def judge(whole: Registry, loose: Any) -> Any:
    """`judge(seed)` makes a mutant, lets the reader judge it, and judges the reader."""
    from lorary.cli.commands.show import files_page, show_page
    from lorary.registry.hub.card import model_card

    packs = [loose(name) for name in ("cooking", "sailing")]
    verdicts: Counter[str] = Counter()

    def decide(seed: int) -> None:
        data, files = mutant(seed, packs[seed % 2])
        started = time.process_time()
        verdict = judged(data, files)
        assert time.process_time() - started < MAX_SECONDS
        if isinstance(verdict, LoraryError):
            verdicts[type(verdict).__name__] += 1
            assert verdict.exit_code in (2, 3, 5, 6)
            assert len(str(verdict)) < 5000
            return
        manifest, pack = verdict
        audit(data, files, pack)
        assert show_page(whole, manifest).blocks
        assert files_page(manifest).blocks
        assert model_card(manifest, repo="acme/lorary-cooking")
        verdicts["accepted"] += 1

    decide.verdicts = verdicts  # type: ignore[attr-defined]
    return decide


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(judge: Any, mutants: int) -> None:
    before = peak_megabytes()

    @settings(
        max_examples=mutants,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.integers(0, 1 << 48))
    def run(seed: int) -> None:
        judge(seed)

    run()
    assert peak_megabytes() - before < MAX_MEGABYTES
    assert sum(judge.verdicts.values()) >= mutants * 0.95
    assert judge.verdicts["IntegrityError"] > mutants * 0.5


def test_three_hundred_mutants_are_refused_or_sound(judge: Any) -> None:
    fuzz(judge, 300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_thousand_mutants_are_refused_or_sound(judge: Any) -> None:
    judge.verdicts.clear()
    fuzz(judge, 20_000)
    print(dict(judge.verdicts))


def test_mutants_reach_all_checks(judge: Any, loose: Any) -> None:
    causes = set()
    for seed in range(200):
        verdict = judged(*mutant(seed, loose()))
        if isinstance(verdict, LoraryError):
            causes.add(re.sub(r"[\d\W].*", "", str(verdict.cause)))

    assert len(causes) > 15, causes
