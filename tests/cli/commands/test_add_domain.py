"""init and add-domain: what they print and what they store."""

import json

from lorary.cli.commands.init import init_page
from lorary.domains.data.catalog import everyday_questions
from lorary.registry import Registry


def test_init_says_what_it_made(built, document):
    found = document(built["printed"]["general"])

    assert found["command"] == "init"
    assert found["name"] == "general"
    assert len(found["losses"]) == 3
    assert 0.9 < found["adaptable"]["share"] <= 1
    assert found["adaptable"]["left_out"] == {}
    assert found["proof"]["unchanged"] is True


def test_add_domain_says_what_it_brought(built, document):
    found = document(built["printed"]["legal"])

    assert (found["name"], found["version"], found["resumed_from"]) == ("legal", 1, 0)
    assert set(found["scores"]) >= {"base", "alone", "routed", "share_of_oracle_gain", "general_base", "general_routed"}
    assert [near["name"] for near in found["neighbours"]] == ["medicine"]
    assert found["drift"]["domains"] == 1
    assert set(found["proof"]["frozen"]) == {"base", "attached", "store", "tensors"}


def test_progress_with_json_is_json_line_by_line(built):
    found = [json.loads(line) for line in built["printed"]["legal"].stderr.splitlines()]

    lines = [line for line in found if "progress" in line]
    probe = json.loads(built["printed"]["legal"].stdout)["chat_probe"]
    assert [line for line in found if line not in lines] == ([] if probe["holds"] else [{"chat_probe": probe}])
    stages = [line["progress"]["stage"] for line in lines]
    assert "training legal" in stages
    assert {"loss", "tokens_per_second"} <= set(lines[stages.index("training legal")]["progress"])


def test_add_domain_prints_plan_progress_and_result(run, bare, rows, tmp_path):
    data = rows(tmp_path / "new.jsonl", "legal")
    options = ["--steps", "2", "--block", "64", "--batch", "2", "--rank", "2", "--no-rank-gates", "--targets", "q_proj"]

    result = run("add-domain", "contracts", "--data", str(data), *options, store=bare, tty=True)

    assert result.exit_code == 0, result.stderr
    assert "Adding contracts from new.jsonl: 16 rows" in result.stderr
    assert "training contracts: 50 % (1 of 2)  loss" in result.stderr
    for word in (
        "contracts was added",
        "contracts@1",
        "loss",
        "tensors and every stored version unchanged",
        "general text",
    ):
        assert word in result.stdout
    assert "q_proj" in run("show", "contracts", store=bare).stdout


def test_a_near_duplicate_is_pointed_out_before_training_and_after(run, bare, built, document):
    options = ["--steps", "1", "--block", "64", "--batch", "2", "--rank", "2"]
    data = ["--data", str(built["data"] / "legal.jsonl")]
    document(run("add-domain", "contracts", *data, *options, "--json", store=bare))

    result = run("add-domain", "contracts-again", *data, *options, "--json", store=bare)

    found = document(result)
    assert found["near_duplicate"]["name"] == "contracts"
    assert found["near_duplicate"]["instead"] == f"registry retrain contracts --data {built['data'] / 'legal.jsonl'}"
    assert found["warm_start"] == "contracts"
    told = [json.loads(line) for line in result.stderr.splitlines()]
    warned = told.index({"near_duplicate": found["near_duplicate"]})
    stages = [line.get("progress", {}).get("stage") for line in told]
    assert warned < stages.index("training contracts-again")

    shown = run("add-domain", "contracts-once-more", *data, *options, store=bare, tty=True)
    for text in (shown.stdout, shown.stderr):
        assert "nearly the same as that of contracts" in text
        assert "registry retrain contracts --data" in text.replace("\n", " ")


def test_a_domain_that_takes_everyday_chat_is_a_loud_warning_and_refused_with_strict(run, bare, tmp_path):
    data = tmp_path / "asked.jsonl"
    data.write_text("".join(json.dumps({"text": f"{asked} " * 3}) + "\n" for asked in everyday_questions()))
    command = ["add-domain", "contracts", "--data", str(data), "--steps", "1", "--block", "64", "--batch", "2"]

    refused = run(*command, "--strict", store=bare)

    assert refused.exit_code == 9
    assert "Error: Nothing was stored: the router would give text to contracts" in refused.stderr
    assert "64 everyday questions" in refused.stderr
    assert "registry compose general:4+contracts" in refused.stderr
    assert refused.stdout == ""
    assert run("show", "contracts", store=bare).exit_code == 3

    warned = run(*command, store=bare)

    assert warned.exit_code == 0
    for text in (warned.stdout, warned.stderr):
        assert "Warning: contracts takes" in text
    assert "What helps:" in warned.stdout
    shown = run("show", "contracts", store=bare)
    assert "everyday chat\ttakes" in shown.stdout


def test_the_data_is_remembered_by_its_absolute_path(run, bare, rows, tmp_path, document):
    rows(tmp_path / "relative.jsonl", "legal")
    options = ["--steps", "1", "--block", "64", "--batch", "2", "--json"]

    document(run("add-domain", "contracts", "--data", "relative.jsonl", *options, store=bare))

    [record] = [json.loads(path.read_text()) for path in (bare / "runs").glob("contracts-*/run.json")]
    assert record["sources"] == [str(tmp_path / "relative.jsonl")]


def test_after_init_the_next_command_finds_the_registry(store, monkeypatch):
    registry = Registry.open(store)

    monkeypatch.delenv("LORARY_STORE", raising=False)
    assert init_page(registry).hints == (f"Add a domain: registry add-domain medicine --store {store}",)

    monkeypatch.setenv("LORARY_STORE", str(store))
    assert init_page(registry).hints == ("Add a domain: registry add-domain medicine",)
