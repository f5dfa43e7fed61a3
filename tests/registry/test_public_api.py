"""The public API: every command is a method, options are typed, data comes in any form, objects show themselves."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lorary
from lorary.cli.app import COMMANDS
from lorary.domains.errors import ConflictError, InputError, NotFoundError
from lorary.registry import Registry

# `import` is a keyword; a report shows retention; `base` is the registry's own
METHODS = {"import": "import_adapter", "report": "retention", "base": "fetch_base"}
PROGRAMS_ONLY = {"quickstart", "version"}  # a demo, and `lorary.__version__`


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - PROGRAMS_ONLY))
def test_every_command_is_a_method(command: str) -> None:
    name = METHODS.get(command, command.replace("-", "_"))

    assert callable(getattr(Registry, name))


@pytest.mark.parametrize("name", [name for name in vars(Registry) if not name.startswith("_")])
def test_options_are_typed_and_named(name: str) -> None:
    method = getattr(Registry, name)
    if isinstance(method, property):
        return

    for parameter in list(inspect.signature(method).parameters.values()):
        assert parameter.name == "self" or parameter.annotation is not parameter.empty
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)


def test_the_package_passes_the_public_names_on() -> None:
    assert lorary.Registry is Registry
    assert lorary.__version__.count(".") == 2
    assert sorted(lorary.__all__) == ["BankConfig", "LoraryError", "Registry", "TrainingConfig", "__version__"]


def test_rows_in_memory_learn_the_same_bytes_as_their_file(
    kp_store: Path, fresh_copy: Any, texts: Any, short_run: Any, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in texts["cooking"].read_text(encoding="utf-8").splitlines()]
    one, other = (Registry.open(_copied(kp_store, tmp_path / name)) for name in ("one", "other"))

    by_file = one.add_domain("cooking", data=str(texts["cooking"]), **short_run(steps=2)).manifest
    by_rows = other.add_domain("cooking", data=rows, **short_run(steps=2)).manifest

    assert {f.path: f.sha256 for f in by_rows.files} == {f.path: f.sha256 for f in by_file.files}
    assert by_rows.train["run"] == by_file.train["run"]
    # the held-out rows are found again
    assert other.evaluate("cooking")["cooking"].bytes == one.evaluate("cooking")["cooking"].bytes


@pytest.mark.parametrize("data", [7, {"text": "one row"}, b"text", {1, 2}])
def test_data_of_another_type_is_refused(data: Any, cooking_store: Path, fresh_copy: Any) -> None:
    registry = fresh_copy(cooking_store)

    with pytest.raises(InputError):
        registry.add_domain("sailing", data=data)

    assert registry.store.domains() == ["cooking", "general"]


@pytest.mark.parametrize("data", [[], (), [[]]])
def test_empty_data_is_not_replaced_by_bundled_text(data: Any, cooking_store: Path, fresh_copy: Any) -> None:
    registry = fresh_copy(cooking_store)

    for call in (registry.evaluate, registry.add_domain):
        with pytest.raises(InputError, match="has no rows"):
            call("medicine" if call == registry.add_domain else "cooking", data=data)

    assert registry.store.domains() == ["cooking", "general"]


def test_a_run_with_the_rows_in_another_order_does_not_resume(
    kp_store: Path, texts: Any, short_run: Any, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in texts["cooking"].read_text(encoding="utf-8").splitlines()]
    clean, other = (Registry.open(_copied(kp_store, tmp_path / name)) for name in ("clean", "other"))
    expected = clean.add_domain("cooking", data=rows[::-1], **short_run()).manifest.digest

    def stop(progress: Any) -> None:
        if progress.stage.startswith("training") and progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.add_domain("cooking", data=rows, on_progress=stop, **short_run())
    added = other.add_domain("cooking", data=rows[::-1], **short_run())

    assert added.resumed_from == 0
    assert added.manifest.digest == expected


def test_values_that_cannot_be_meant_are_refused(whole: Registry, tmp_path: Path) -> None:
    model: Any = None
    calls: list[Any] = [
        lambda: whole.export("cooking", tmp_path / "out", to="gguf"),  # type: ignore[arg-type]
        lambda: whole.generate(model, "text", max_new_tokens=0),
        lambda: whole.generate(model, "text", temperature=-1.0),
        lambda: whole.retention(max_bytes=0),
        lambda: whole.gc(older_than_s=-1.0, dry_run=True),
        lambda: whole.gc(older_than_s=float("nan"), dry_run=True),
        lambda: whole.retrain("cooking", data="rows.jsonl", bank={"rnk": 3}),
    ]

    for call in calls:
        with pytest.raises(InputError):
            call()
    with pytest.raises((NotFoundError, InputError)):
        whole.log("")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", ["BankConfig(rank=1.5)", 'BankConfig(targets="q_proj")', "TrainingConfig(steps=1.5)"])
def test_settings_of_another_type_are_refused(call: str) -> None:
    # in a process of its own: the tests check types at run time, users' programs do not
    program = f"from lorary import *\ntry: {call}\nexcept LoraryError as error: print(error.exit_code)"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "2\n"


def test_list_and_show_return_manifests(whole: Registry) -> None:
    assert [manifest.name for manifest in whole.list()] == ["general", "cooking", "sailing"]
    assert whole.show("cooking@latest") == whole.list()[1]


def test_the_log_has_every_version_newest_first(whole: Registry) -> None:
    entries = whole.log()

    assert [(entry.name, entry.version) for entry in entries] == [("sailing", 1), ("cooking", 1), ("general", 1)]
    assert whole.log("cooking") == [entry for entry in entries if entry.name == "cooking"]
    with pytest.raises(NotFoundError):
        whole.log("boating")


def test_aliases_are_set_listed_and_removed(cooking_store: Path, fresh_copy: Any) -> None:
    registry = fresh_copy(cooking_store)

    assert registry.alias("cooking") == {"latest": 1}
    assert registry.alias("cooking@1", "stable") == {"latest": 1, "stable": 1}
    assert registry.show("cooking@stable").version == 1
    assert registry.alias("cooking", "stable", remove=True) == {"latest": 1}


def test_removing_an_alias_needs_its_name(whole: Registry) -> None:
    with pytest.raises(InputError, match="needs the alias"):
        whole.alias("cooking", remove=True)


def test_verify_gc_and_diff_work_from_python(cooking_store: Path, fresh_copy: Any, light_pack: Any) -> None:
    registry = fresh_copy(cooking_store)
    light_pack(registry, "cooking", text="two")

    assert {check.state for check in registry.verify(deep=True)} == {"ok"}
    assert {check.version for check in registry.verify("cooking@2")} == {2}
    assert registry.gc(dry_run=True).is_dry
    assert registry.gc(older_than_s=0.0).bytes >= 0
    assert registry.diff("cooking@1", "cooking@2").feature_cosine == pytest.approx(1.0)


def test_the_kp_bank_cannot_be_removed(whole: Registry) -> None:
    with pytest.raises((ConflictError, InputError)):
        whole.remove("general")


def test_doctor_examines_a_folder_without_a_registry(tmp_path: Path) -> None:
    findings = {finding.what: finding for finding in Registry.doctor(tmp_path)}

    assert findings["registry"].verdict == "warn"
    assert "torch" in findings


def test_a_registry_shows_itself(whole: Registry) -> None:
    assert "cooking@1" in repr(whole)
    assert "base=" in repr(whole)
    page = whole._repr_html_()
    assert page.count("<tr>") == 1 + len(whole.list())


def test_what_a_registry_shows_cannot_break_the_page(cooking_store: Path, fresh_copy: Any, tmp_path: Path) -> None:
    registry = fresh_copy(cooking_store)
    moved = registry.store.path.rename(tmp_path / "<script>alert(1)</script>".replace("/", "&"))

    assert "<script>" not in Registry.open(moved)._repr_html_()


def _copied(store: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(store, to))
