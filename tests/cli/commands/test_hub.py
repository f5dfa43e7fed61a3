"""push, pull, search and compositions with hf:// terms, as a person sees them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from lorary.registry.store.store import Store

REPO = "acme/lorary-legal"


@pytest.fixture
def mine(store, tmp_path):
    """A copy of the registry, which a test may change."""
    return shutil.copytree(store, tmp_path / "mine")


@pytest.fixture
def theirs(bare):
    """A registry with the same KP bank and no domains."""
    return bare


def test_push_says_what_went_where(run, mine, local_hub):
    done = run("push", "legal", REPO, store=mine, tty=True)

    assert done.exit_code == 0, done.stderr
    assert "legal@1 was pushed to the Hub" in done.stdout
    for word in (f"{REPO}@v1, a new repository", local_hub.url, "new or changed", "sha256:"):
        assert word in done.stdout
    assert f"registry pull {REPO}@v1" in done.stderr
    again = run("push", "legal", REPO, store=mine, tty=True)
    assert "legal@1 is on the Hub already" in again.stdout


def test_push_for_programs(run, mine, local_hub, document):
    planned = document(run("push", "legal", "acme", "--dry-run", "--json", store=mine))
    pushed = document(run("push", "legal", "acme", "--message", "Mine", "--private", "--json", store=mine))

    assert (planned["state"], planned["makes_repo"], planned["commit"]) == ("planned", True, None)
    assert planned["card"].startswith("---\n")
    assert (pushed["state"], pushed["tag"], pushed["repo"]) == ("pushed", "v1", REPO)
    assert len(pushed["commit"]) == 40
    assert local_hub.repos.all[REPO].private


def test_push_warns_of_a_manifest_that_names_other_domains(run, mine, local_hub):
    store = Store.open(mine)
    legal = store.manifest("legal")
    packs = {"general@1": "sha256:a", "secret@2": "sha256:b"}
    named = replace(legal, name="older", proof={"frozen": {"packs": packs, "base": "sha256:c", "tensors": 1}})
    store.adopt(named, alias="latest")

    warned = run("push", "older", "acme/older", "--dry-run", store=mine)
    quiet = run("push", "legal", REPO, "--dry-run", store=mine)

    assert (warned.exit_code, quiet.exit_code) == (0, 0)
    assert "names other domains of this registry: secret." in warned.stderr
    assert "names other domains" not in quiet.stderr
    assert run("push", "older", "acme/older", "--dry-run", "--json", store=mine).stderr.startswith(
        '{"names_others": ["secret"]}'
    )


def test_a_dry_run_shows_the_card_beside_the_result(run, mine, local_hub):
    done = run("push", "legal", REPO, "--dry-run", store=mine)

    assert "state\tplanned" in done.stdout
    assert "# lorary-legal" in done.stderr
    assert local_hub.repos.all == {}


def test_pull_says_what_came_from_where(run, mine, theirs, local_hub):
    run("push", "legal", REPO, store=mine)

    done = run("pull", REPO, store=theirs, tty=True)

    assert done.exit_code == 0, done.stderr
    for word in (
        "legal@1 was pulled",
        f"hf://{REPO}@v1 at {local_hub.url}",
        "against the manifest",
        "the one that the pack was trained over",
    ):
        assert word in done.stdout
    assert "registry compose legal@1" in done.stderr
    assert "was pulled before" in run("pull", REPO, store=theirs, tty=True).stdout


def test_pull_for_programs(run, mine, theirs, local_hub, document):
    run("push", "legal", REPO, store=mine)

    done = document(run("pull", f"{REPO}@v1", "--as", "law", "--json", store=theirs))

    assert (done["name"], done["version"], done["is_new"], done["preservation"]) == ("law", 1, True, "same")
    assert done["origin"]["repo"] == REPO
    assert json.loads(run("list", "--json", store=theirs).stdout)["domains"][1]["name"] == "law"


def test_pull_offline_says_that_nobody_was_asked(run, mine, theirs, local_hub):
    run("push", "legal", REPO, store=mine)
    run("pull", REPO, store=theirs)
    local_hub.stop()

    done = run("pull", REPO, "--offline", store=theirs)

    assert done.exit_code == 0, done.stderr
    assert "The Hub was not asked" in done.stderr


def test_a_composition_with_a_pack_on_the_hub(run, mine, theirs, local_hub, document, built):
    run("push", "legal", REPO, store=mine)

    done = run("compose", f"hf://{REPO}@v1:0.5+general", "--json", store=theirs)
    answered = run("generate", f"hf://{REPO}", "The court", "--max-new-tokens", "3", store=theirs)
    data = str(built["data"] / "legal.jsonl")
    scored = run("evaluate", f"hf://{REPO}", "--data", data, "--no-questions", "--json", store=theirs)
    routed = run("route", "The court", "--in", f"hf://{REPO}", "--json", store=theirs)

    assert document(done)["composition"] == "legal@1:0.5"
    assert answered.exit_code == 0, answered.stderr
    assert f"hf://{REPO}@v1 is legal@1, pulled before" in answered.stderr
    assert set(document(routed)["gates"]) == {"general", "legal"}
    assert set(document(scored)["domains"]) == {"legal"}


def test_search_lists_packs(run, mine, local_hub, document):
    run("push", "legal", REPO, store=mine)

    shown = run("search", "legal", tty=True)
    listed = document(run("search", "--limit", "5", "--json"))

    assert REPO in shown.stdout
    assert f"registry pull {REPO}" in shown.stderr
    assert [pack["repo"] for pack in listed["packs"]] == [REPO]
    assert "No pack was found" in run("search", "nothing").stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["pull", "acme/none"], 7, "acme/none does not exist on the Hub"),
        (["pull", "none"], 2, "is not a valid Hub repository"),
        (["push", "leagl"], 3, "There is no domain named 'leagl'"),
        (["compose", "hf://acme/none+legal"], 7, "acme/none does not exist on the Hub"),
        (["compose", "hf://none"], 2, "Cannot read the composition"),
    ],
)
def test_errors_have_their_code_and_three_lines(run, mine, local_hub, words, code, said):
    done = run(*words, store=mine)

    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Fix: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_waiting_program_says_so(run, mine, theirs, local_hub, no_waiting):
    run("push", "legal", REPO, store=mine)
    local_hub.fault("GET /api/models/", "status", 503)

    assert run("pull", REPO, store=theirs).exit_code == 0
    assert no_waiting == [1.0]


def test_the_token_is_nowhere(run, mine, local_hub, tmp_path):
    """A canary in every place where a token may stand: it is in no output and no file, whatever fails."""
    canary = "hf_CanaryCanaryCanary"
    local_hub.users[canary] = ["alice", "acme"]
    environment = os.environ | local_hub.env | {"HF_TOKEN": canary, "LORARY_DEBUG": "1", "LORARY_STORE": str(mine)}
    commands = [
        ["push", "legal", REPO],
        ["pull", REPO],
        ["search"],
        ["pull", "acme/none"],
        ["show", "legal", "--manifest"],
    ]
    message = f"Invalid header: authorization: Bearer {canary}"
    printed = ""
    for i, words in enumerate([*commands, *commands]):
        if i >= len(commands):
            local_hub.fault("/api/", "status", 400, X_Error_Message=message)
        command = [sys.executable, "-m", "lorary.cli", *words]
        done = subprocess.run(
            command, env=environment | {"LORARY_DEBUG": "" if i else "1"}, capture_output=True, text=True
        )
        printed += done.stdout + done.stderr
        local_hub.faults.clear()

    assert "***" in printed
    assert canary not in printed
    files = [path for path in tmp_path.rglob("*") if path.is_file() and local_hub.repos.folder not in path.parents]
    assert len(files) > 20
    assert not [path for path in files if canary.encode() in path.read_bytes()]
