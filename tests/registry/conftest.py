"""A draft of a pack, small but complete; and whole registries over a tiny random base model.

torch is imported inside the fixtures, so that tests of files without torch start fast.
"""

import copy
import json
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.registry.store.blobs import sha256_of
from lorary.registry.store.manifest import BaseRecord, ExpertRecord, PackManifest
from lorary.registry.store.seals import write_sealed
from lorary.registry.store.strict_json import canonical_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lorary.registry import Registry
    from lorary.registry.store.store import Store


@pytest.fixture(scope="session")
def draft():
    """What `Store.commit` takes: a manifest without files and version."""
    base = BaseRecord(
        id="pocket",
        revision=None,
        architecture="LlamaForCausalLM",
        weights=sha256_of(b"weights"),
        tokenizer=sha256_of(b"tokenizer"),
        chat_template=None,
        dtype="float32",
    )
    expert = ExpertRecord(
        id="e0",
        rank=4,
        alpha=8.0,
        method="lora",
        targets=("q_proj", "v_proj"),
        layers=(2, 3),
        parameters=1024,
    )
    return PackManifest(
        name="legal",
        role="domain",
        description="Contracts.",
        license="apache-2.0",
        base=base,
        experts=(expert,),
        allocation={"schedule": "linear", "counts": [0, 0, 1, 1]},
        lineage={},
        train={"seed": 7, "seconds": 1.5},
        evaluation={},
        proof={},
        created="2026-01-02T03:04:05+00:00",
        tool={"lorary": "0.1.0"},
    )


# --- a whole registry: a random base model, small texts, short runs; each step is done once and copied ---

WORDS = {
    "general": "the a is was it they we day time people good long little way year old some many go see",
    "cooking": "butter flour oven whisk sugar dough bake knead onion garlic pepper simmer pastry glaze",
    "sailing": "mast keel rudder anchor harbour tide sail starboard jib hull buoy mooring gale stern",
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """JSONL files of 24 rows of random words each; no word is in two of them."""
    folder = tmp_path_factory.mktemp("texts")
    files = {}
    for name, words in WORDS.items():
        draw = random.Random(name)
        rows = [{"text": " ".join(draw.choices(words.split(), k=14)) + "."} for _ in range(24)]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """The tiny Llama and its tokenizer as a transformers folder; tests must not change it."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def short_run() -> Callable[..., dict[str, Any]]:
    """`short_run(steps=.., ..)` gives the keywords `bank` and `training` of a run of six small steps."""
    from lorary.adapters.config import BankConfig, TrainingConfig

    usual = {"steps": 6, "block": 64, "batch": 2, "learning_rate": 1e-2, "checkpoint_every": 2}
    return lambda **changes: {
        "bank": BankConfig(rank=2, expert_free=0.25),
        "training": TrainingConfig(**(usual | changes)),
    }


@pytest.fixture(scope="session")
def kp_store(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, texts: Any, short_run: Any) -> Path:
    """A store with the KP bank alone; tests must not change it."""
    from lorary.registry import Registry

    folder = tmp_path_factory.mktemp("stores") / "kp"
    return Registry.init(folder, base=str(base_folder), data=[texts["general"]], **short_run()).store.path


@pytest.fixture(scope="session")
def cooking_store(kp_store: Path, texts: Any, short_run: Any) -> Path:
    """The same with `cooking` added; tests must not change it."""
    return _copy_with(kp_store, "cooking", texts, short_run)


@pytest.fixture(scope="session")
def both_store(cooking_store: Path, texts: Any, short_run: Any) -> Path:
    """The same with `sailing` added; tests must not change it."""
    return _copy_with(cooking_store, "sailing", texts, short_run)


@pytest.fixture(scope="session")
def whole(both_store: Path) -> "Registry":
    """The registry of KP, `cooking` and `sailing`, for tests that only read."""
    from lorary.registry import Registry

    return Registry.open(both_store)


@pytest.fixture
def fresh_copy(tmp_path: Path) -> Callable[[Path], "Registry"]:
    """`fresh_copy(store)` opens a copy of a store, without kept scores and compositions; the test may change it."""
    from lorary.registry import Registry

    kept = shutil.ignore_patterns("compositions", "scores")
    return lambda store: Registry.open(shutil.copytree(store, tmp_path / "store", ignore=kept))


@pytest.fixture(scope="session")
def logits_of() -> "Callable[[PreTrainedModel], Tensor]":
    """The logits of a model for two fixed rows of 24 tokens."""
    import torch

    def logits(model: Any) -> Any:
        ids = torch.randint(6, 300, (2, 24), generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.clone()

    return logits


@pytest.fixture(scope="session")
def state_of() -> "Callable[[Store], dict[str, tuple[list[int], dict[str, int]]]]":
    """What a store has: versions and aliases of every domain."""
    return lambda store: {name: (store.versions(name), store.aliases(name)) for name in store.domains()}


@pytest.fixture(scope="session")
def rewrite() -> "Callable[..., PackManifest]":
    """`rewrite(store, name, path, change)` changes the bytes of a pack file, and its manifest so that digests agree."""

    def change_file(store: Any, name: str, path: str, change: Callable[[bytes], bytes], **changes: Any) -> PackManifest:
        manifest = store.manifest(name)
        data = change(store.read(manifest, path))
        files = [
            replace(file, sha256=store.blobs.put(data), size=len(data)) if file.path == path else file
            for file in manifest.files
        ]
        altered = replace(manifest, files=tuple(files), **changes)
        write_sealed(store.path / "domains" / name / f"{manifest.version}.json", altered.to_json())
        return altered

    return change_file


@dataclass(frozen=True)
class LoosePack:
    """A pack in memory that a test may change at will; `sealed` makes the manifest's digests agree with the bytes."""

    manifest: dict[str, Any]
    files: dict[str, bytes]

    def with_files(self, **files: bytes | None) -> "LoosePack":
        kept = {path: data for path, data in (self.files | files).items() if data is not None}
        return LoosePack(self.manifest, kept)

    def with_manifest(self, change: Callable[[dict[str, Any]], Any]) -> "LoosePack":
        manifest = copy.deepcopy(self.manifest)
        change(manifest)
        return LoosePack(manifest, self.files)

    def sealed(self) -> tuple[PackManifest, Any]:
        from lorary.registry.pack.pack_source import PackBytes

        kinds = {file["path"]: file["kind"] for file in self.manifest["files"]}
        files = [
            {"path": path, "size": len(data), "sha256": sha256_of(data), "kind": kinds.get(path, "router")}
            for path, data in sorted(self.files.items())
        ]
        data = canonical_json(self.manifest | {"files": files})
        return PackManifest.from_json(data, source="hostile"), PackBytes(self.files)

    def write_to(self, folder: Path) -> PackManifest:
        """Write it sealed, as a folder that holds a pack."""
        manifest, source = self.sealed()
        for path, data in [*source.files.items(), ("lorary.json", manifest.to_json())]:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return manifest


@pytest.fixture(scope="session")
def loose(whole: "Registry") -> Callable[..., LoosePack]:
    """`loose("cooking")` is a stored pack in memory."""

    def take_out(name: str = "cooking") -> LoosePack:
        manifest = whole.show(name)
        files = {file.path: whole.store.read(manifest, file.path) for file in manifest.files}
        return LoosePack(json.loads(manifest.to_json()), files)

    return take_out


@pytest.fixture
def saved(whole: "Registry", tmp_path: Path) -> Path:
    """A saved composition of `cooking`, which the test may change."""
    return whole.save("cooking", tmp_path / "saved")


# --- real packs without training, for what only moves them: the pack of `cooking` with other numbers ---


@pytest.fixture
def light_store(tmp_path: Path, kp_store: Path) -> "Callable[[str], Registry]":
    """`light_store("a")` opens a registry in a new folder, with the KP bank alone; all of them have the same."""
    from lorary.registry import Registry

    return lambda folder: Registry.open(shutil.copytree(kp_store, tmp_path / folder))


@pytest.fixture
def light_pack(cooking_store: Path, rescaled: Callable[[str], Any]) -> "Callable[..., PackManifest]":
    """`light_pack(registry, "legal", text="one")` stores the next version of a domain, with tensors of its own."""
    from lorary.registry.store.store import Store

    pattern = Store.open(cooking_store).manifest("cooking")

    def make(registry: "Registry", name: str = "legal", *, text: str = "one", **changes: Any) -> PackManifest:
        made = replace(pattern, **({"name": name, "description": text, "files": (), "version": 0} | changes))
        return registry.store.commit(made, rescaled(text))

    return make


@pytest.fixture(scope="session")
def rescaled(cooking_store: Path) -> Callable[[str], Any]:
    """`rescaled("one")` gives the files of `cooking` with its B matrices scaled by a number made of the text."""
    from lorary.registry import Registry
    from lorary.registry.pack.pack import pack_files, read_pack

    registry = Registry.open(cooking_store)
    base, layout = registry.base_record, registry.base.layout

    @cache
    def files(text: str) -> Any:
        pack = read_pack(registry.store, registry.store.manifest("cooking"))
        for layer in pack.bank.layers.values():
            for target in layer.B:
                layer.B[target] *= 0.5 + int(sha256_of(text.encode())[-4:], 16) / 2**16
        return pack_files(pack, layout=layout, base_id=base.id, revision=base.revision)

    return files


def _copy_with(store: Path, name: str, texts: dict[str, Path], short_run: Callable[..., dict[str, Any]]) -> Path:
    from lorary.registry import Registry

    copy = Registry.open(shutil.copytree(store, store.with_name(name)))
    copy.add_domain(name, data=[texts[name]], **short_run())
    return copy.store.path


@pytest.fixture
def theirs(local_hub: Any, light_store: Any, light_pack: Any, no_waiting: None) -> "Registry":
    """A registry whose domain legal is on the Hub in two versions, as acme/lorary-legal."""
    registry = light_store("theirs")
    for text in ("one", "two"):
        light_pack(registry, text=text)
        registry.push("legal", "acme/lorary-legal")
    return registry


@pytest.fixture
def ours(theirs: "Registry", light_store: Any) -> "Registry":
    """Another registry, for the same base model and with the same KP bank."""
    return light_store("ours")


# --- adapters of PEFT, beside ours ---


@pytest.fixture(scope="session")
def peft() -> Any:
    """The installed PEFT."""
    return pytest.importorskip("peft")


@pytest.fixture(scope="session")
def save_adapter(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, peft: Any) -> Callable[..., Path]:
    """`save_adapter(seed=1, use_rslora=True)` is a folder that PEFT saved, of an adapter whose B is not zero."""
    import torch
    from transformers import AutoModelForCausalLM

    def save(seed: int = 0, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("adapters") / "adapter"
        usual = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = peft.get_peft_model(
                AutoModelForCausalLM.from_pretrained(base_folder), peft.LoraConfig(**(usual | changes))
            )
            model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def by_peft(base_folder: Path, peft: Any) -> Callable[..., Any]:
    """`by_peft(folder, model=None)` loads an adapter over the base; warnings are errors, as everywhere in the tests."""
    from transformers import AutoModelForCausalLM

    def load(folder: Path, model: Any = None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(base_folder) if model is None else model
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # PEFT asks for it
            return peft.PeftModel.from_pretrained(model, str(folder)).eval()

    return load


@pytest.fixture
def importing(kp_store: Path, texts: Any, tmp_path: Path) -> Callable[..., Any]:
    """`importing({"a": folder})` is a registry with these adapters as domains."""
    from lorary.registry import Registry

    def add(adapters: dict[str, Path]) -> Any:
        registry = Registry.open(shutil.copytree(kp_store, tmp_path / "importing", dirs_exist_ok=True))
        for name, folder in adapters.items():
            registry.import_adapter(name, folder, data=[texts["sailing"]])
        return registry

    return add


@pytest.fixture(scope="session")
def refused_with() -> Callable[..., str]:
    """`refused_with(5, action)` expects an error of this exit code, and is what it says."""
    from lorary.domains.errors import LoraryError

    def check(code: int, action: Callable[[], Any]) -> str:
        with pytest.raises(LoraryError) as refusal:
            action()
        assert refusal.value.exit_code == code, refusal.value
        return f"{refusal.value} {refusal.value.cause}"

    return check
