"""compose, generate, route, evaluate: in every form."""

import json

import pytest


@pytest.fixture(scope="module")
def saved(run, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "both"
    result = run("compose", "medicine+legal", "--out", str(folder), "--json", store=store)
    assert json.loads(result.stdout)["saved_to"] == str(folder)
    return folder


def test_compose_shows_what_it_will_be(run, store):
    result = run("compose", "medicine:0.7+legal:0.3", store=store, tty=True)

    assert result.exit_code == 0
    for word in ("general@1+legal@1+medicine@1", "60.0 %", "28.0 %", "12.0 %", "the same in every slot", "ranks"):
        assert word in result.stdout


def test_compose_with_constant_weights(run, store, document):
    found = document(run("compose", "medicine:0.7+legal:0.3", "--static", "--json", store=store))

    assert found["static"] is True
    assert {slot["name"]: slot["prior"] for slot in found["slots"]} == {"general": 0, "legal": 0.3, "medicine": 0.7}


def test_what_it_says_to_type_next_is_a_command_that_works(run, store, saved, tmp_path):
    routed = run("compose", "medicine+legal", store=store).stderr
    constant = run("compose", "medicine:1", "--static", store=store).stderr
    kept = run("compose", "medicine", "--out", "kept", store=store).stderr

    assert 'registry generate legal+medicine "..."' in routed
    assert 'registry generate medicine:1 --static "..."' in constant
    assert 'registry generate ./kept "..."' in kept
    assert (tmp_path / "kept").is_dir()
    assert run("compose", "./kept", store=store).exit_code == 0


def test_compose_in_a_pipe(run, store, values):
    lines = values(run("compose", "medicine+legal", store=store))

    assert ["composition", "legal+medicine"] in lines
    assert ["SLOT", "VERSION", "PRIOR", "EXPERTS", "PARAMETERS", "PER LAYER"] in lines


def test_compose_answers(run, store, document):
    found = document(
        run("compose", "medicine", "--prompt", "The patient", "--max-new-tokens", "4", "--json", store=store)
    )

    assert found["answer"]["new_tokens"] <= 4
    assert set(found["answer"]["route"]) == {"general", "medicine"}


def test_a_saved_composition_answers_as_the_registry_does(run, store, saved):
    question = ["The patient was", "--max-new-tokens", "4"]

    ours = run("generate", "medicine+legal", *question, store=store)
    theirs = run("generate", str(saved), *question, store=store)

    assert ours.exit_code == theirs.exit_code == 0
    assert ours.stdout == theirs.stdout


def test_a_saved_composition_that_routes_cannot_be_made_static(run, store, saved):
    result = run("compose", str(saved), "--static", store=store)

    assert result.exit_code == 2
    assert "is routed, not static" in result.stderr


@pytest.mark.parametrize("words", [["-"], []], ids=["dash", "nothing"])
def test_generate_reads_the_prompt_from_a_pipe(run, store, words, document):
    result = run("generate", "medicine", *words, "--max-new-tokens", "3", "--json", store=store, input="The patient\n")

    found = document(result)
    assert found["prompt_tokens"] > 1
    assert "tokens" not in found


def test_generate_shows_the_route(run, store, document):
    words = ["generate", "medicine+legal", "The patient was given", "--max-new-tokens", "4", "--show-route"]

    drawn = run(*words, store=store, tty=True)
    found = document(run(*words, "--json", store=store))

    assert "0 general   1 legal   2 medicine" in drawn.stdout
    assert "MEAN GATE" in drawn.stdout
    assert any(f"[{slot}:" in drawn.stdout for slot in (0, 1, 2))
    assert len(found["tokens"][0]["gates"]) == 3


def test_generate_colours_tokens_by_slot_where_there_is_colour(run, store):
    result = run(
        *["generate", "medicine", "The patient", "--max-new-tokens", "2", "--show-route"],
        store=store,
        tty=True,
        env={"NO_COLOR": "", "TERM": "xterm-256color"},
    )

    assert "[0:" not in result.stdout
    assert "\x1b[90m" in result.stdout or "\x1b[36m" in result.stdout


def test_generate_is_repeatable_with_a_seed(run, store):
    words = ["generate", "medicine", "The", "--temperature", "1", "--seed", "3", "--max-new-tokens", "6"]

    assert run(*words, store=store).stdout == run(*words, store=store).stdout


def test_route_says_who_takes_a_text(run, store, document, values):
    text = "The court finds that party which broke contract pays for damage under clause of law."

    found = document(run("route", text, "--json", store=store))
    lines = values(run("route", text, "--in", "legal", store=store))
    drawn = run("route", text, store=store, tty=True)

    assert found["taken_by"] == max(found["gates"], key=found["gates"].get)
    assert set(found["similarity"]) == {"legal", "medicine"}
    assert lines[0] == ["SLOT", "GATE", "", "SIMILARITY"]
    assert "taken by" in drawn.stdout


def test_evaluate_scores_every_domain(run, store, document):
    found = document(run("evaluate", "medicine+legal", "--no-questions", "--json", store=store))

    assert set(found["domains"]) == {"general", "legal", "medicine"}
    assert set(found["domains"]["legal"]) >= {"base", "alone", "routed", "interval", "share_of_oracle_gain"}
    assert found["domains"]["legal"]["accuracy"] == {}


def test_evaluate_on_other_text_with_questions(run, store, rows, tmp_path, values):
    data = rows(tmp_path / "other.jsonl", "medicine", count=4, seed=9)
    question = {"prompt": "Is the patient given milligrams?", "completion": "yes", "choices": ["yes", "no"]}
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps(question) + "\n")

    lines = values(run("evaluate", "medicine", "--data", str(data), store=store))

    scores = next(line for line in lines if line[0] == "BITS/BYTE")
    assert scores[-2:] == ["95 % OF GAIN", "ROUTED RIGHT"]
    assert ["QUESTIONS", "BASE", "OWN EXPERTS", "ROUTED", "95 %", "RIGHT"] in lines
    assert [line[0] for line in lines].count("medicine") == 2
