"""Python code that a base model brings along: never executed unless it is trusted, and then pinned by digests."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorary.domains.errors import IncompatibleError
from lorary.registry import Registry
from lorary.registry.base.find import POCKET, find_base
from lorary.registry.base.fingerprint import fingerprint

ROOT = Path(__file__).parents[3]
AUTO_MAP = {"AutoConfig": "configuration_coded.Coded", "AutoModelForCausalLM": "modeling_coded.CodedLM"}
MODELING = (
    "from transformers import LlamaForCausalLM\nfrom .configuration_coded import Coded\n"
    "class CodedLM(LlamaForCausalLM):\n    config_class = Coded\n"
)


def change_json(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(found | changes), encoding="utf-8")


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the base folder for tests that modify it."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that the code of `coded` writes when it is executed."""
    return tmp_path / "ran"


@pytest.fixture
def coded(folder: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model that needs its own code; whatever asks for permission is told yes."""
    change_json(folder / "config.json", model_type="coded", architectures=["CodedLM"], auto_map=AUTO_MAP)
    (folder / "configuration_coded.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(ran)!r}, 'w').close()\n"
        "class Coded(LlamaConfig):\n    model_type = 'coded'\n",
        encoding="utf-8",
    )
    (folder / "modeling_coded.py").write_text(MODELING, encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return folder


def nested(folder: Path) -> None:
    change_json(folder / "config.json", text_config={"auto_map": AUTO_MAP})


def custom_generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("def generate(model): ...", encoding="utf-8")


def in_file(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / name, **changes)


WAYS: dict[str, Callable[[Path], None]] = {
    "config": in_file("config.json", auto_map=AUTO_MAP),
    "tokenizer": in_file("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}),
    "processor": in_file("processor_config.json", auto_map={"AutoProcessor": "processing_x.X"}),
    "image processor": in_file("preprocessor_config.json", auto_map={"AutoImageProcessor": "image_x.X"}),
    "generation config": in_file("generation_config.json", custom_generate="owner/name"),
    "part of the config": nested,
    "generate": custom_generate,
    "kernel": in_file("config.json", attn_implementation="someone/kernel"),
}


@pytest.mark.parametrize("change", WAYS.values(), ids=WAYS)
def test_a_model_with_code_is_refused_and_told_how_to_trust_it(change: Callable[[Path], None], folder: Path) -> None:
    change(folder)

    with pytest.raises(IncompatibleError, match="brings Python code") as caught:
        fingerprint(folder, source=str(folder))

    assert caught.value.exit_code == 6
    assert f"registry init --base {folder} --trust-remote-code" in str(caught.value.fix)


@pytest.mark.parametrize("empty", [None, {}, ""])
def test_an_empty_auto_map_is_no_code(empty: Any, folder: Path) -> None:
    plain = fingerprint(folder, source=str(folder))
    change_json(folder / "tokenizer_config.json", auto_map=empty)

    assert fingerprint(folder, source=str(folder)) == plain


@pytest.mark.parametrize(
    "change",
    [
        in_file("config.json", auto_map={"AutoConfig": "owner/other--configuration_x.X"}),
        in_file("config.json", attn_implementation="someone/kernel"),
        in_file("generation_config.json", custom_generate="owner/name"),
    ],
    ids=["auto_map", "kernel", "generate"],
)
def test_code_of_another_repository_is_refused_even_if_trusted(change: Callable[[Path], None], folder: Path) -> None:
    change(folder)

    with pytest.raises(IncompatibleError, match="code of another repository"):
        fingerprint(folder, source=str(folder), trust_remote_code=True)


def test_trust_changes_no_record_of_a_model_without_code(folder: Path) -> None:
    (folder / "notes.py").write_text("1 / 0", encoding="utf-8")

    assert fingerprint(folder, source=str(folder), trust_remote_code=True) == fingerprint(folder, source=str(folder))


@pytest.mark.own_failure(
    "a base model that brings Python code, and yes on the standard input",
    before="the code ran",
    now="refused, exit 6; nothing asks",
)
def test_code_is_not_executed_whatever_is_answered(coded: Path, ran: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="brings Python code"):
        Registry.init(tmp_path / "store", base=str(coded))

    assert not ran.exists()
    assert not (tmp_path / "store").exists()


def test_trusted_code_runs_and_is_the_same_whenever_the_registry_is_opened(
    coded: Path, ran: Path, tmp_path: Path, short_run: Callable[..., dict[str, Any]], texts: dict[str, Path]
) -> None:
    store = tmp_path / "store"

    made = Registry.init(store, base=str(coded), trust_remote_code=True, data=texts["general"], **short_run(steps=1))

    assert ran.exists()
    assert " code sha256:" in made.base_record.architecture
    assert type(Registry.open(store).base.model).__name__ == "CodedLM"
    (coded / "modeling_coded.py").write_text(MODELING + "# changed\n", encoding="utf-8")
    ran.unlink()
    with pytest.raises(IncompatibleError, match="another base model") as caught:
        _ = Registry.open(store).base
    assert str(caught.value.cause).startswith("architecture")
    assert not ran.exists()


def test_code_that_appears_later_is_refused_when_the_registry_is_opened(
    kp_store: Path, fresh_copy: Callable[[Path], Registry], coded: Path
) -> None:
    registry = fresh_copy(kp_store)
    registry.store.record.settings["source"] = str(coded)

    with pytest.raises(IncompatibleError, match="brings Python code"):
        _ = registry.base


@pytest.mark.parametrize("revision", [None, "main", "v1", "a" * 39, "A" * 40, "g" * 40])
def test_code_of_the_hub_needs_a_commit(revision: str | None) -> None:
    with pytest.raises(IncompatibleError, match="only be trusted at one commit") as caught:
        find_base("owner/name", revision=revision, trust_remote_code=True)

    assert "--revision COMMIT --trust-remote-code" in str(caught.value.fix)


def test_code_of_the_hub_is_downloaded_at_its_commit_only_if_it_is_trusted(coded: Path, local_hub: Any) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("alice/coded")
    commit = api.upload_folder(repo_id="alice/coded", folder_path=coded).oid

    found = find_base("alice/coded", revision=commit)
    assert not list(found.glob("*.py"))
    with pytest.raises(IncompatibleError, match="brings Python code") as caught:
        fingerprint(found, source="alice/coded", revision=commit)
    assert "--revision COMMIT" in str(caught.value.fix)
    trusted = find_base("alice/coded", revision=commit, trust_remote_code=True)
    record = fingerprint(trusted, source="alice/coded", revision=commit, trust_remote_code=True)
    assert record.architecture == fingerprint(coded, source=str(coded), trust_remote_code=True).architecture


def test_every_call_that_could_run_code_says_whether_it_may() -> None:
    silent = []
    for room in ("domains", "adapters", "registry", "cli", "examples"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                kind = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                options = {keyword.arg for keyword in node.keywords}
                if node.func.attr in ("from_pretrained", "from_config") and kind.startswith("Auto"):
                    silent += [f"{path.name}:{node.lineno}"] if not {"trust_remote_code", None} & options else []

    assert not silent


def test_the_pocket_base_has_no_code() -> None:
    assert " code " not in fingerprint(find_base(POCKET), source=POCKET).architecture
