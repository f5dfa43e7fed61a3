"""Try every family of transformers' table of causal language models, and write down which work.

    OMP_NUM_THREADS=1 python tests/families/sweep.py [FAMILY ...]

Without names it runs all, each in a process of its own, and writes results.json beside this file and docs/models.md.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results.json", HERE.parents[1] / "docs" / "models.md"
TIMEOUT_S = 180
HEAD = """# Models

Written by `python tests/families/sweep.py`, which runs every family in the table of causal language models of
transformers {transformers} from a tiny random configuration: {works} work, {refused} are refused, {failed} fail.

*Works* means, for random experts on every target: experts of zero give the base's logits bit for bit; fused modules
equal merged weights; decoding with the cache equals computing without it; left and right padding change nothing; beams
agree with and without a cache; the gradient equals a difference of losses. Where the base itself differs from itself,
that is said, and lorary is compared no further than that. *Share* is the part of the decoder layers' weights that
experts extend: the rest, such as the routed experts of a mixture of experts, stays as it is.

| family | | share | modules left out, and why |
|---|---|---|---|
"""


def families() -> list[str]:
    """Names of all families."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_family(family: str) -> dict[str, Any]:
    """Return what happened: `result` is works, refused, untried or failed."""
    import torch
    from checks import check_base
    from configs import tiny_config, tiny_model

    from lorary.domains.base_model import check_kind
    from lorary.domains.errors import LoraryError

    try:
        check_kind(tiny_config_values(family))
        base = tiny_model(tiny_config(family))
        base(input_ids=torch.arange(3, 15)[None])
    except LoraryError as error:
        return refusal(error)
    except Exception as error:  # the base alone: a kind that no tiny config was found for
        return {"result": "untried", "why": one_line(error)}
    try:
        found = check_base(base)
    except LoraryError as error:
        return refusal(error)
    except Exception as error:
        return {"result": "failed", "why": one_line(error)}
    excluded = dict(sorted(found.targets.excluded.items()))
    return {"result": "works", "share": round(found.targets.share, 3), "excluded": excluded, "notes": found.notes}


def tiny_config_values(family: str) -> dict[str, Any]:
    """The values of config.json that say what kind of model it is."""
    from transformers import CONFIG_MAPPING

    return {"model_type": family, "is_encoder_decoder": getattr(CONFIG_MAPPING[family], "is_encoder_decoder", False)}


def refusal(error: Any) -> dict[str, Any]:
    return {"result": "refused", "why": f"{error.message} {error.cause}".strip(), "exit_code": error.exit_code}


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def in_process(family: str) -> dict[str, Any]:
    """Try a family in a process of its own, which may crash or hang."""
    try:
        command = [sys.executable, str(Path(__file__)), family]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"result": "failed", "why": f"no result after {TIMEOUT_S} s"}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        return {"result": "failed", "why": (ran.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(lines[-1])


def page(results: dict[str, Any]) -> str:
    """docs/models.md."""
    found = results["families"]
    counts = {kind: sum(one["result"] == kind for one in found.values()) for kind in ("works", "refused", "failed")}
    rows = [row(family, one) for family, one in found.items() if one["result"] != "untried"]
    untried = [family for family, one in found.items() if one["result"] == "untried"]
    text = HEAD.format(transformers=results["transformers"], **counts) + "\n".join(rows) + "\n"
    return text + (f"\nNot tried, for want of a tiny configuration: {', '.join(untried)}.\n" if untried else "")


def row(family: str, one: dict[str, Any]) -> str:
    if one["result"] != "works":
        return f"| {family} | **{one['result']}** | | {one['why'].replace('|', ' ')} |"
    reasons: dict[str, list[str]] = {}
    for path, reason in one["excluded"].items():
        reasons.setdefault(reason, []).append(f"`{path}`")
    said = [f"{', '.join(paths[:4])}{' and others' if len(paths) > 4 else ''}: {why}" for why, paths in reasons.items()]
    return f"| {family} | works | {one['share'] * 100:.0f} % | {'; '.join([*said, *one['notes']])} |"


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sys.path.insert(0, str(HERE))
    if len(names) == 1:
        print(json.dumps(try_family(names[0])))
        return
    results = {"transformers": transformers.__version__, "families": {}}
    for family in names or families():
        results["families"][family] = one = in_process(family)
        print(family, one["result"], one.get("why", ""), flush=True)
    if not names:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
