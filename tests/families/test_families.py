"""Every family of causal language models: a dozen here, all in the nightly sweep, whose results are docs/models.md."""

import json
from typing import Any

import pytest

from lorary.domains.base_model import find_layout
from lorary.domains.errors import InputError, LoraryError
from lorary.domains.target_modules import find_targets

from .checks import check_base
from .configs import tiny_config, tiny_model
from .sweep import PAGE, RESULTS, families, in_process, page

# one of each kind: dense, parallel, learned positions, experts, latent attention, hybrids, state space, multimodal
DOZEN = (
    *("bloom", "deepseek_v3", "falcon", "gemma3", "glm4_moe", "jamba"),
    *("lfm2", "llama4_text", "mamba2", "opt", "phimoe", "qwen3_next"),
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of models in transformers


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.own_failure(
    "families of transformers other than plain decoders",
    before="43 of 99 failed, each in its own way",
    now="docs/models.md: work, or are refused by name",
)
@pytest.mark.parametrize("family", DOZEN)
def test_a_family_works_as_the_page_says(family: str, results: dict[str, Any]) -> None:
    said, base = results["families"][family], tiny_model(tiny_config(family))

    if said["result"] == "refused":
        with pytest.raises(LoraryError) as caught:
            check_base(base)
        assert caught.value.exit_code == said["exit_code"]
    else:
        assert check_base(base).targets.excluded == said["excluded"]


def test_no_family_fails(results: dict[str, Any]) -> None:
    assert [family for family, one in results["families"].items() if one["result"] == "failed"] == []
    assert {one["exit_code"] for one in results["families"].values() if one["result"] == "refused"} == {6}


def test_the_page_is_made_of_the_results(results: dict[str, Any]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(results), "run: python tests/families/sweep.py"


def test_a_module_fed_other_positions_is_refused_by_name() -> None:
    base = tiny_model(tiny_config("deepseek_v3"))
    targets = find_targets(base, find_layout(base))

    with pytest.raises(InputError, match="kv_b_proj") as caught:
        targets.choose(("kv_b_proj",))

    assert "other positions" in str(caught.value.cause)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_every_family_is_as_the_page_says(results: dict[str, Any]) -> None:
    found = {family: in_process(family) for family in families()}

    assert found == results["families"]
