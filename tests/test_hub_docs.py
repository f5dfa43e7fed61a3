"""The commands of docs/hub.md, run as written by a shell against a local Hub server."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorary.registry import Registry
from lorary.registry.store.manifest import PackManifest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hub.md"
SECTION = re.search(r"## The commands\n(.*?)\n## ", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SHORT = ["--steps", "2", "--block", "64", "--batch", "2", "--rank", "2"]


@pytest.fixture
def shell(local_hub, tmp_path):
    """`shell(line)` runs a line in a folder with the registries `mine` and `theirs`, and returns what it printed."""
    program = shlex.join([sys.executable, "-m", "lorary.cli"])
    environment = os.environ | local_hub.env | {"OMP_NUM_THREADS": "1"}

    def run(line):
        line = re.sub(r"^registry\b", lambda _: program, line)
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        return done.stdout

    return run


@pytest.mark.slow
def test_the_commands_of_the_page_work(shell, tiny_llama, tiny_tokenizer, tmp_path, local_hub):
    tiny_llama(vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    rows = "".join(
        f'{{"text": "The court of row {i} finds that the tenant pays rent number {i * i}."}}\n' for i in range(40)
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    short = " ".join(SHORT)
    shell(f"registry init mine --base base --data rows.jsonl {short}")
    shutil.copytree(tmp_path / "mine", tmp_path / "theirs")
    shell(f"registry add-domain legal --data rows.jsonl --store mine {short}")
    assert SECTION is not None
    lines = [line for block in re.findall(r"```sh\n(.*?)```", SECTION[1], re.DOTALL) for line in block.splitlines()]

    printed = {line: shell(line) for line in lines}

    assert len(printed) >= 12
    assert "acme/lorary-legal" in printed["registry search legal"]
    mine, theirs = Registry.open(tmp_path / "mine"), Registry.open(tmp_path / "theirs")
    pushed = mine.show("legal")
    assert theirs.show("legal").to_json() == pushed.to_json()
    assert PackManifest.from_json(local_hub.repos.read("acme/lorary-legal", "lorary.json", "v1"), source="") == pushed
    assert [theirs.store.versions(name) for name in ("contracts", "general", "legal")] == [[1], [1], [1]]
