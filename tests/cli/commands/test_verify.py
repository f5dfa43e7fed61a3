"""verify, gc, doctor: what they say, in all three forms, and how they end."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lorary.registry.store.store import Store


@pytest.fixture
def own(store: Path, tmp_path: Path) -> Path:
    """A copy of the registry that a test may damage."""
    return Path(shutil.copytree(store, tmp_path / "own"))


def damage(store: Path) -> None:
    opened = Store.open(store)
    path = opened.blobs.path(opened.manifest("legal").file("router/router.json").sha256)
    path.chmod(0o644)
    path.write_bytes(b"rot")


def test_verify_counts_the_files_of_every_version(run, store, values, document):
    header, *rows = values(run("verify", store=store))

    assert header == ["VERSION", "OK", "BAD", "MISSING"]
    assert [row[0] for row in rows] == ["general@1", "legal@1", "medicine@1"]
    assert all(row[2:] == ["0", "0"] for row in rows)
    found = document(run("verify", "--deep", "--json", store=store))
    assert found["whole"] is True
    assert {file["path"] for file in found["files"]} >= {"lorary.json", "(pack)", "router/router.json"}


def test_verify_of_one_version_lists_its_files(run, store):
    result = run("verify", "legal@latest", store=store, tty=True)

    assert result.exit_code == 0
    assert "experts/e0/adapter_model.safetensors" in result.stdout
    assert "files of" in result.stdout


def test_verify_ends_with_five_and_names_what_is_damaged(run, own):
    damage(own)

    result = run("verify", store=own)

    assert result.exit_code == 5
    assert "legal@1\trouter/router.json\tbad" in result.stdout
    assert "router/router.json" in result.stderr
    as_json = run("verify", "--json", store=own)
    assert as_json.exit_code == 5
    assert json.loads(as_json.stdout)["whole"] is False
    assert json.loads(as_json.stderr)["error"]["code"] == "integrity"


def test_one_unreadable_manifest_stops_neither_list_nor_log_nor_gc(run, own):
    (own / "domains" / "legal" / "1.json").write_bytes(b"{")

    listed, logged, collected = (run(command, store=own) for command in ("list", "log", "gc"))

    for result, name in ((listed, "legal"), (logged, "legal@1")):
        assert result.exit_code == 5
        assert "medicine" in result.stdout
        assert f"Not shown, because it cannot be read: {name}." in result.stderr
    assert collected.exit_code == 0
    assert "No blobs are deleted while manifests cannot be read: legal@1." in collected.stderr
    assert run("verify", store=own).exit_code == 5


def test_small_files_of_an_older_program_are_counted_and_sealed(run, own, document):
    for folder in list(own.rglob("seals")):
        shutil.rmtree(folder)

    before, after = document(run("verify", "--json", store=own)), document(run("verify", "--seal", "--json", store=own))

    assert (before["whole"], before["unsealed"] > 0) == (True, True)
    assert (after["whole"], after["unsealed"]) == (True, 0)


def test_gc_says_what_it_would_delete_and_deletes_it(run, own, document):
    stray = Store.open(own).blobs.put(b"stray")
    os.utime(Store.open(own).blobs.path(stray), (0, 0))

    planned = document(run("gc", "--dry-run", "--json", store=own))
    assert planned["blobs"] == [stray]
    assert "registry gc" in run("gc", "--dry-run", store=own).stderr
    done = run("gc", "--older-than", "7d", store=own, tty=True)

    assert done.exit_code == 0
    assert "deleted" in done.stdout
    assert stray not in Store.open(own).blobs
    assert run("verify", store=own).exit_code == 0


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1w", "1 h h", "9" * 20 + "s"])
def test_gc_refuses_what_is_no_time(text, run, store):
    result = run("gc", "--older-than", text, store=store)

    assert result.exit_code == 2
    assert "24h" in result.stderr


def test_doctor_tells_what_a_helper_wants_to_know(run, store, document):
    found = {one["what"]: one for one in document(run("doctor", "--json", store=store))["findings"]}

    expected = {
        "python",
        "lorary",
        "torch",
        "system",
        "devices",
        "registry",
        "base model",
        "domains",
        "blobs",
        "ballast",
    }
    expected |= {"free space", "writable", "hard links", "locks", "case", "clock"}
    assert expected <= found.keys()
    assert found["domains"]["value"] == "3 with 3 versions, 0 removed"
    assert found["base model"]["verdict"] == "ok"
    assert not list(store.rglob(".tmp-*"))
    assert "hard links" in run("doctor", store=store, tty=True).stdout


def test_doctor_helps_where_there_is_no_registry_and_where_one_is_damaged(run, own, tmp_path):
    nowhere = run("doctor", store=tmp_path / "nowhere")
    assert nowhere.exit_code == 0
    assert "registry init" in nowhere.stderr
    (own / "store.json").write_bytes(b"{")
    damaged = run("doctor", "--json", store=own)

    assert damaged.exit_code == 0
    verdicts = {one["what"]: one["verdict"] for one in json.loads(damaged.stdout)["findings"]}
    assert verdicts["registry"] == "bad"


def test_doctor_sees_what_crashes_left_behind(run, own, document):
    (own / "cache" / ".tmp-1").write_bytes(b"")
    (own / "ballast").unlink()

    found = {one["what"]: one for one in document(run("doctor", "--json", store=own))["findings"]}

    assert (found["temporary files"]["value"], found["temporary files"]["verdict"]) == ("1", "warn")
    assert found["ballast"]["verdict"] == "warn"
