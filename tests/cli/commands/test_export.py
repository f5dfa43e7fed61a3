"""export: what is printed, in every form."""


def test_export_prints_the_command_that_serves_it(run, store, tmp_path):
    out = tmp_path / "served"

    result = run("export", "medicine", "--to", "vllm", "--out", str(out), "--served-base", "org/base", store=store)

    assert result.exit_code == 0, result.stderr
    expected = f"vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules medicine-v1={out}"
    assert result.stdout.splitlines()[-1] == expected
    assert "constant: the means" in result.stdout


def test_export_as_one_document(run, store, tmp_path, document):
    found = document(run("export", "medicine", "--to", "tar", "--out", str(tmp_path / "m.tar"), "--json", store=store))

    assert (found["command"], found["use"], found["to"], found["versions"]) == (
        "export",
        "tar xf " + str(tmp_path / "m.tar"),
        "tar",
        "medicine@1",
    )


def test_what_routes_is_refused_with_the_command_that_works(run, store, tmp_path):
    result = run("export", "medicine+legal", "--to", "vllm", "--out", str(tmp_path / "out"), store=store)

    assert result.exit_code == 6
    assert "Fix: export it with constant weights: registry export legal+medicine --static --to vllm" in result.stderr
