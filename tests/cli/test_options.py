"""Options and the library agree; the reference page is fresh; every command has an example that works."""

import shlex
from dataclasses import fields
from typing import get_type_hints

import pytest

from lorary.cli.app import COMMANDS
from lorary.cli.options import BankOptions, TrainingOptions, given_options
from lorary.cli.reference import PAGE, reference

EXAMPLES = {
    name: next(line.strip() for line in (command.__doc__ or "").splitlines() if "Example: " in line)
    for name, command in COMMANDS.items()
}


def test_the_help_names_the_defaults_of_the_library():
    from lorary.adapters.config import TrainingConfig

    hints = get_type_hints(TrainingOptions, include_extras=True)
    said = {field.name: hints[field.name].__metadata__[0].show_default for field in fields(TrainingOptions)}
    known = TrainingConfig()

    open_ones = {name for name in said if getattr(known, name) is None}
    assert open_ones == {"steps", "learning_rate"}
    assert {n: said[n] for n in said if n not in open_ones} == {
        n: str(getattr(known, n)) for n in said if n not in open_ones
    }


def test_options_become_the_library_s_settings():
    from lorary.adapters.config import BankConfig

    assert BankOptions().config() == BankConfig()
    given = BankOptions(rank=2, targets="q_proj, v_proj", no_rank_gates=True, method="rslora").config()
    assert (given.targets, given.rank_gates, given.method) == (("q_proj", "v_proj"), False, "rslora")
    assert given_options(TrainingOptions(steps=3, seed=1)) == {"steps": 3, "seed": 1}


def test_the_reference_page_is_fresh():
    stale = f"{PAGE} is stale; write it again: .venv/bin/python -m lorary.cli.reference"
    assert PAGE.read_text(encoding="utf-8") == reference(), stale


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_of_the_command(run, name):
    result = run(name, "--help")

    assert result.exit_code == 0
    assert EXAMPLES[name].startswith(f"Example: registry {name}")
    assert "Example:" in result.stdout


@pytest.mark.parametrize("name", ["list", "show", "compose", "generate", "route", "version"])
def test_the_example_works(run, store, name):
    words = shlex.split(EXAMPLES[name])[2:]

    assert run(*words, store=store).exit_code == 0


def test_no_arguments_show_the_help(run):
    result = run()

    assert result.exit_code == 0
    assert "add-domain" in result.stdout
