"""The model card of a pack: README.md on the Hub, YAML for machines above, Markdown for people below.

Everything that came from outside, such as a description or the name of a data file, is written so that it is only text.
The card is made anew by each push and is no part of the pack's content.
"""

import re
import shlex
from typing import Any, Final

from ...adapters.composition import GENERAL
from ..pack.peft_config import VLLM_RANKS
from ..store.manifest import ExpertRecord, PackManifest

TAGS: Final = ("lora", "peft", "lorary", "lora-experts", "continual-learning")
SCORE: Final = "bits per byte, lower is better"

_MARKS = re.compile(r"([\\`*_{}\[\]<>()#!|~&@:$^]|(?<=(?i:www))\.)")  # also of links without markup: x@y, http:, www.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_PLAIN = re.compile(r"[A-Za-z0-9._/:@+, -]+")


def model_card(manifest: PackManifest, *, repo: str) -> str:
    """The card of a version that is pushed to a repository."""
    import yaml

    front = yaml.safe_dump(_front_matter(manifest, repo), sort_keys=False, allow_unicode=True, width=1000)
    sections = [
        _about(manifest, repo),
        _use(manifest, repo),
        _experts(manifest),
        _scores(manifest),
        _limits(manifest),
        _provenance(manifest),
        _verify(manifest, repo),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def plain(text: str) -> str:
    r"""Text as Markdown that shows exactly this text, inside a line.

    >>> print(plain("<b>*new*</b>\n[x](y) www.z"))
    \<b\>\*new\*\</b\> \[x\]\(y\) www\.z
    """
    return _MARKS.sub(r"\\\1", " ".join(_one_line(text).split()))


def _one_line(text: str) -> str:
    return _CONTROLS.sub(" ", text)


def _code(text: object) -> str:
    """Text in a code span, where nothing is markup; what could end the span is shown as plain text."""
    return f"`{text}`" if _PLAIN.fullmatch(str(text)) else plain(str(text))


def _front_matter(manifest: PackManifest, repo: str) -> dict[str, Any]:
    base = manifest.base.id if is_hub_model(manifest) else None
    known: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": _license(manifest.license),
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "tags": [*TAGS, *([f"base_model:adapter:{base}"] if base else [])],
        "model-index": _model_index(manifest, repo),
        "lorary": {
            "name": manifest.name,
            "version": manifest.version,
            "role": manifest.role,
            "digest": manifest.digest,
            "base": _one_line(manifest.base.id),
            "base_weights": manifest.base.weights,
            "experts": len(manifest.experts),
            "parameters": sum(expert.parameters for expert in manifest.experts),
            "bits_per_byte": manifest.evaluation.get("routed"),
            "bits_per_byte_of_base": manifest.evaluation.get("base"),
        },
    }
    return {key: value for key, value in known.items() if value is not None}


def is_hub_model(manifest: PackManifest) -> bool:
    """Whether the base model is one of the Hub, and not a folder or the built-in one."""
    return _HUB_ID.fullmatch(manifest.base.id) is not None and "/" in manifest.base.id


def _license(text: str) -> str:
    """The license as the Hub knows them; `other` for anything else."""
    return text.lower() if re.fullmatch(r"[A-Za-z0-9.-]{1,40}", text) and text.lower() != "unknown" else "other"


def _model_index(manifest: PackManifest, repo: str) -> list[dict[str, Any]] | None:
    """The scores as the Hub reads them."""
    found = manifest.evaluation
    texts = [(f"held-out text of {manifest.name}", "held-out", "routed"), ("general text", "general", "general_routed")]
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": name, "type": kind},
            "metrics": [{"type": "bits_per_byte", "name": SCORE, "value": found[key]}],
        }
        for name, kind, key in texts
        if isinstance(found.get(key), int | float)
    ]
    return [{"name": repo, "results": results}] if results else None


def _about(manifest: PackManifest, repo: str) -> str:
    what = "The knowledge-preservation bank" if manifest.name == GENERAL else f"The domain {_code(manifest.name)}"
    total = sum(expert.parameters for expert in manifest.experts)
    return f"""# {repo.partition("/")[2]}

{what} for the frozen base model {_code(manifest.base.id)}, version {manifest.version}.
{len(manifest.experts)} LoRA experts with {total:,} parameters in all, and their own router, made by lorary, a
continual-learning registry of LoRA experts.

What it is about: {plain(manifest.description) or "not said"}"""


def _use(manifest: PackManifest, repo: str) -> str:
    name, base = manifest.name, manifest.base.id
    is_bank = name == GENERAL
    shown = shlex.quote(base) if is_hub_model(manifest) or base == "pocket" else "PATH-OF-THE-BASE-MODEL"
    hub_base = base if is_hub_model(manifest) else "PATH-OF-THE-BASE-MODEL"
    spec = f"{name}@{manifest.version}" if is_bank else name
    rank = max(_ranks(manifest.experts), default=1)
    return f"""## How to use it

With lorary, routed token by token, alone or together with other domains:

```sh
pip install lorary
registry init --base {shown}
registry pull {repo}@v{manifest.version}
registry generate {spec} "Once upon a time"
```

With plain PEFT: the whole pack with constant gates, which is what lorary gives with `--static`; or one expert.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{hub_base}")
model = PeftModel.from_pretrained(base, "{repo}", revision="v{manifest.version}")
one = PeftModel.from_pretrained(base, "{repo}", subfolder="experts/{manifest.experts[0].id}")
```

With vLLM: the same constant gates. `registry export {name} --to vllm` writes the adapter and prints the command, or:

```sh
vllm serve {hub_base} --enable-lora --max-lora-rank {_served_rank(rank)} --lora-modules {name}={repo}
```"""


def _experts(manifest: PackManifest) -> str:
    rows = [
        f"| {_code(e.id)} | {e.rank} | {e.alpha:g} | {e.method} | {', '.join(map(_code, e.targets))}"
        f" | {_ranges(e.layers)} | {e.parameters:,} |"
        for e in manifest.experts
    ]
    head = [
        "| expert | rank | alpha | scale | target modules | decoder layers | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(["## Experts", "", *head, *rows])


def _scores(manifest: PackManifest) -> str:
    """What it learned, and what it left alone."""
    found, drift = manifest.evaluation, manifest.proof.get("drift") or {}
    rows = [
        ("held-out text of the domain", found.get("base"), found.get("alone"), found.get("routed")),
        ("general text", found.get("general_base"), None, found.get("general_routed")),
    ]
    listed = [f"| {name} | {_number(b)} | {_number(o)} | {_number(r)} |" for name, b, o, r in rows if r is not None]
    head = ["| text | base model | its own experts alone | routed |", "|---|---|---|---|"]
    lines = ["## Scores and retention", "", f"In {SCORE}.", "", *head, *listed]
    share, interval = found.get("share_of_oracle_gain"), found.get("interval") or []
    if isinstance(share, int | float):
        lines += ["", f"Routing keeps {share:.0%} of the gain that its own experts alone would bring."]
    if len(interval) == 2:
        lines += ["", f"95 % interval of the routed score: {_number(interval[0])} to {_number(interval[1])}."]
    if drift.get("domains"):
        flips = _number(drift.get("top1_flips"))
        older = _number(drift.get("domains"))
        lines += ["", f"Of the domains that were there before ({older}), {flips} are routed elsewhere now."]
    if manifest.proof.get("unchanged"):
        lines += ["", "The base model and all older experts were byte-identical before and after its training."]
    return "\n".join(lines)


def _limits(manifest: PackManifest) -> str:
    return f"""## Limits

- It fits only the base model with the weights {_code(manifest.base.weights)}; lorary refuses any other.
- Digests tell that nothing was changed on the way. They do not tell what the experts will say: try them before use.
- Routing token by token needs lorary; elsewhere the gates are constant.
- What it learned comes from the data below, with its gaps and its bias; nothing else was added to make it safe."""


def _provenance(manifest: PackManifest) -> str:
    data, settings = manifest.train.get("data") or {}, manifest.train.get("settings") or {}
    preservation = manifest.lineage.get("preservation") or {}
    rows = [
        ("content digest", _code(manifest.digest)),
        ("base model, commit", f"{_code(manifest.base.id)} {_code(manifest.base.revision or '-')}"),
        ("base weights", _code(manifest.base.weights)),
        ("tokenizer", _code(manifest.base.tokenizer)),
        ("data", _texts(*(data.get("files") or ["not said"]))),
        ("data digest", _code(data.get("digest", "-"))),
        ("rows, of them held out", _texts(data.get("rows"), data.get("held_out"))),
        ("steps, seed", _texts(manifest.train.get("steps"), settings.get("seed"))),
        ("version before", _texts(manifest.lineage.get("parent") or "none")),
        ("trained over the KP bank", _code(preservation.get("digest") or "-")),
        ("made", f"{_code(manifest.created)} with {_code(manifest.made_with)}"),
        ("license", plain(manifest.license)),
    ]
    return "\n".join(["## Provenance", "", "| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])


def _texts(*values: object) -> str:
    """Values as text, one after the other."""
    return ", ".join("-" if value is None else plain(str(value)) for value in values)


def _verify(manifest: PackManifest, repo: str) -> str:
    return f"""## Verify

`registry pull` checks every file against `lorary.json`, and stores all of it or nothing. The digest that

```sh
registry pull {repo}@v{manifest.version}
registry show {manifest.name} --json
```

prints has to be `{manifest.digest}`."""


def _number(value: object) -> str:
    return "-" if value is None or isinstance(value, bool) or not isinstance(value, int | float) else f"{value:z.4g}"


def _ranks(experts: tuple[ExpertRecord, ...]) -> list[int]:
    """Length of the rank axis in each decoder layer that has experts."""
    layers = {layer for expert in experts for layer in expert.layers}
    return [sum(expert.rank for expert in experts if layer in expert.layers) for layer in layers]


def _served_rank(rank: int) -> int:
    """The least --max-lora-rank of vLLM that holds so many."""
    return next((size for size in VLLM_RANKS if size >= rank), rank)


def _ranges(layers: tuple[int, ...]) -> str:
    """Numbers with runs drawn together.

    >>> _ranges((2, 3, 4, 7))
    '2-4, 7'
    """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
