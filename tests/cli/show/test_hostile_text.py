"""Whatever a pack's texts hold, no command lets them command the terminal, break a table or a JSON document."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorary.registry.store.seals import write_sealed
from lorary.registry.store.strict_json import canonical_json

EVIL = "\x1b[31mred\x1b]0;title\x07 \x9b2J\u202egpj\u2066x\u200f\r\n\tname: !!python/object <script>x</script> =cmd()"
BOLD = re.compile("\x1b\\[[01]m")  # our own, where colours are off; the hostile text has none
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

COMMANDS = [
    ["list"],
    ["show", "medicine"],
    ["show", "medicine", "--files"],
    ["show", "medicine", "--manifest"],
    ["log"],
    ["alias", "medicine"],
    ["compose", "medicine+legal"],
    ["verify", "medicine"],
    ["diff", "medicine", "legal"],
    ["gc", "--dry-run"],
    ["remove", "medicine"],
]


def spoil(value: Any, *, key: str = "") -> Any:
    """Every text that nothing is computed from becomes hostile, and every name in the free records."""
    if isinstance(value, dict):
        free = key in ("tool", "packs")
        return {name + EVIL if free else name: spoil(member, key=name) for name, member in value.items()}
    if isinstance(value, list):
        return [spoil(member, key=key) for member in value]
    return value + EVIL if isinstance(value, str) else value


@pytest.fixture
def hostile(store: Path, tmp_path: Path) -> Path:
    """A copy of the registry where every text of medicine's manifest that may be any text is hostile."""
    copy = Path(shutil.copytree(store, tmp_path / "hostile"))
    path = copy / "domains" / "medicine" / "1.json"
    manifest = json.loads(path.read_bytes())
    for key in ("description", "license", "created", "lineage", "train", "evaluation", "proof", "tool"):
        manifest[key] = spoil(manifest[key], key=key)
    manifest["allocation"]["schedule"] += EVIL
    manifest["base"]["dtype"] += EVIL
    manifest["base"]["id"] += EVIL
    manifest["experts"][0]["targets"][0] += EVIL
    manifest["files"][0]["kind"] += EVIL
    write_sealed(path, canonical_json(manifest))
    return copy


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("tty", [False, True], ids=["pipe", "terminal"])
def test_no_command_passes_on_what_could_command_a_terminal(
    tty: bool, command: list[str], run: Callable[..., Any], hostile: Path
) -> None:
    result = run(*command, store=hostile, tty=tty)

    if command[-1] != "--manifest" or tty:  # in a pipe it is the manifest, byte for byte
        assert not FORBIDDEN.search(BOLD.sub("", result.stdout))
    assert not FORBIDDEN.search(result.stderr)
    assert "Traceback" not in result.stderr
    assert result.exit_code in (0, 2)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] not in ("remove",)], ids=" ".join)
def test_json_stays_one_document_of_plain_signs(command: list[str], run: Callable[..., Any], hostile: Path) -> None:
    result = run(*command, "--json", store=hostile)

    assert json.loads(result.stdout)
    assert result.stdout.isascii()
    assert not FORBIDDEN.search(result.stdout)


def test_a_cell_of_a_pipe_stays_one_cell(run: Callable[..., Any], hostile: Path) -> None:
    result = run("show", "medicine", store=hostile)

    (line,) = [line for line in result.stdout.splitlines() if line.startswith("description\t")]
    assert line.count("\t") == 1
    assert "red" in line
