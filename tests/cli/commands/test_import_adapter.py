"""import: from an adapter that PEFT saved to a domain, in every form."""

import json
import shutil
import warnings
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base_folder) -> Path:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters") / "mine"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config).save_pretrained(folder)
    return folder


def test_import_shows_what_it_brought(run, bare, rows, tmp_path, adapter):
    data = rows(tmp_path / "m.jsonl", "medicine", count=20)

    result = run("import", "medicine", str(adapter), "--data", str(data), store=bare, tty=True)

    assert result.exit_code == 0, result.stderr
    assert "medicine was imported" in result.stdout
    assert "imported from mine" in result.stdout
    assert "4 experts in 4 of 4 layers, rank 2" in result.stdout
    shown = run("show", "medicine", store=bare, tty=True)
    assert "imported from mine" in shown.stdout
    assert run("list", store=bare).exit_code == 0


def test_import_as_one_document(run, bare, rows, tmp_path, adapter, document):
    data = rows(tmp_path / "m.jsonl", "medicine", count=20)

    found = document(run("import", "medicine", str(adapter), "--data", str(data), "--json", store=bare))

    assert (found["command"], found["name"], found["version"]) == ("import", "medicine", 1)
    assert found["imported"]["from"] == "mine"
    assert found["experts_per_layer"] == [1, 1, 1, 1]


def test_a_near_duplicate_is_pointed_out_as_when_a_domain_is_added(run, store, built, adapter, tmp_path, document):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    data = str(built["data"] / "legal.jsonl")

    result = run("import", "contracts", str(adapter), "--data", data, "--json", store=copy)

    found = document(result)["near_duplicate"]
    assert (found["name"], found["instead"]) == ("legal", f"registry retrain legal --data {data}")
    told = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert {"near_duplicate": found} in told
    shown = run("import", "more", str(adapter), "--data", data, store=copy, tty=True)
    assert "Its text is nearly the same as that of" in shown.stdout
    assert "registry retrain" in shown.stdout


def test_an_import_without_text_says_that_it_is_not_routed(run, bare, adapter, document):
    result = run("import", "notes", str(adapter), store=bare)

    assert result.exit_code == 0, result.stderr
    assert "Warning: notes has no text" in result.stdout
    assert "registry compose notes --static --prompt" in result.stderr
    assert "without text, so never routed" in run("show", "notes", store=bare).stdout
    found = document(run("import", "more", str(adapter), "--json", store=bare))
    assert (found["routing"], found["scores"], found["chat_probe"]) == ("none", None, None)
    assert "not routed\tmore, notes: imported without text" in run("route", "the patient", store=bare).stdout
    refused = run("compose", "notes", store=bare)
    assert refused.exit_code == 2
    assert "Fix: give constant weights: registry compose notes --static" in refused.stderr
    assert run("compose", "notes", "--static", store=bare).exit_code == 0


def test_what_cannot_be_imported_is_an_error_of_three_lines(run, bare, rows, tmp_path, adapter):
    folder = shutil.copytree(adapter, tmp_path / "dora")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    data = rows(tmp_path / "m.jsonl", "medicine", count=20)

    result = run("import", "medicine", str(folder), "--data", str(data), store=bare)

    assert result.exit_code == 6
    assert "Cause: use_dora is True: DoRA rescales" in result.stderr
