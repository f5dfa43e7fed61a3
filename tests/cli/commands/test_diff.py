"""diff: two versions side by side."""


def test_diff_draws_both_versions(run, store):
    result = run("diff", "legal", "medicine", store=store, tty=True)

    assert result.exit_code == 0, result.stderr
    for words in ("legal@1", "medicine@1", "|dW|", "CHANGE", "own text, routed", "router/router.safetensors", "cosine"):
        assert words in result.stdout


def test_diff_of_a_version_with_itself_lists_no_file(run, store):
    result = run("diff", "legal@1", "legal@latest", store=store)

    assert "FILE\tSTATE" not in result.stdout
    assert "LAYER\tEXPERTS" in result.stdout


def test_diff_gives_one_json_document(run, store, document):
    found = document(run("diff", "legal", "medicine", "--json", store=store))

    assert [version["name"] for version in found["versions"]] == ["legal", "medicine"]
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    assert all(layer["change"] > 0 for layer in found["layers"])
    assert len(found["scores"]["routed"]) == 2


def test_diff_of_what_is_not_there(run, store):
    assert run("diff", "legal", "leagl", store=store).exit_code == 3
