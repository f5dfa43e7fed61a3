"""The model card of a pack: README.md on the Hub, with YAML front matter and a Markdown body.

The body is the template card.md.jinja. Packs come from strangers, so every value that the template prints is escaped
and shows as plain text, unless a filter has already turned it into Markdown. The card is rendered anew by each push and
is not part of the pack's content.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jinja2 import Environment, FileSystemLoader, Template, Undefined

from ...adapters.composition import GENERAL
from ..pack.peft_config import VLLM_RANKS
from ..store.manifest import ExpertRecord, PackManifest

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE: Final = Path(__file__).with_name("card.md.jinja")
TAGS: Final = ("lora", "peft", "lorary", "lora-experts", "continual-learning")
METRIC_NAME: Final = "bits per byte, lower is better"
UNKNOWN_BASE: Final = "PATH_TO_BASE_MODEL"  # printed where the base model is not on the Hub

_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#!|~&@:$^]|(?<=(?i:www))\.)")  # also autolinks: x@y, http:, www.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_PLAIN = re.compile(r"[A-Za-z0-9._/:@+, -]+")
_NOT_VERBATIM = re.compile(r"[^A-Za-z0-9._/@+-]")


def model_card(manifest: PackManifest, *, repo: str) -> str:
    """Return the model card of a version that is pushed to `repo`."""
    experts, base = manifest.experts, manifest.base
    hub_base = base.id if _is_on_hub(manifest) else UNKNOWN_BASE
    body = _template().render(
        vars(manifest),
        repo=repo,
        is_preservation=manifest.name == GENERAL,
        parameters=_parameters(manifest),
        hub_base=hub_base,
        lorary_base=base.id if base.id == "pocket" else hub_base,
        # a bare `general` takes no effect in a composition
        reference=f"{manifest.name}@{manifest.version}" if manifest.name == GENERAL else manifest.name,
        max_lora_rank=_max_lora_rank(experts),
        scores=manifest.evaluation,
        drift=manifest.proof.get("drift") or {},
        chat=manifest.proof.get("chat") or {},
        is_routed=manifest.is_routed,
        data=manifest.train.get("data") or {},
        settings=manifest.train.get("settings") or {},
        parent=manifest.parent,
        preservation=manifest.lineage.get("preservation") or {},
        digest=manifest.digest,
        made_with=manifest.made_with,
    )
    return f"---\n{_front_matter(manifest, repo).to_yaml()}\n---\n\n{body}"


def _front_matter(manifest: PackManifest, repo: str) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCardData

    base = manifest.base.id if _is_on_hub(manifest) else None
    scores = manifest.evaluation
    datasets = [
        (f"held-out text of {manifest.name}", "held-out", "routed"),
        ("general text", "general", "general_routed"),
    ]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=name,
            metric_type="bits_per_byte",
            metric_name=METRIC_NAME,
            metric_value=scores[key],
        )
        for name, kind, key in datasets
        if isinstance(scores.get(key), int | float)
    ]
    return ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        license=_license(manifest.license),
        base_model=base,
        base_model_relation="adapter" if base else None,
        tags=[*TAGS, *([f"base_model:adapter:{base}"] if base else [])],
        model_name=repo if results else None,
        eval_results=results or None,
        lorary={
            "name": manifest.name,
            "version": manifest.version,
            "role": manifest.role,
            "digest": manifest.digest,
            "base": _without_controls(manifest.base.id),
            "base_weights": manifest.base.weights,
            "experts": len(manifest.experts),
            "parameters": _parameters(manifest),
            "bits_per_byte": scores.get("routed"),
            "bits_per_byte_of_base": scores.get("base"),
        },
    )


def _is_on_hub(manifest: PackManifest) -> bool:
    """Return whether the base model is named by a Hub id, not a folder or the built-in model."""
    return _HUB_ID.fullmatch(manifest.base.id) is not None


def _license(text: str) -> str:
    """Return the license identifier in the Hub's spelling, or `other`."""
    return text.lower() if re.fullmatch(r"[A-Za-z0-9.-]{1,40}", text) and text.lower() != "unknown" else "other"


def _parameters(manifest: PackManifest) -> int:
    return sum(expert.parameters for expert in manifest.experts)


def _max_lora_rank(experts: tuple[ExpertRecord, ...]) -> int:
    """Return the smallest --max-lora-rank of vLLM that fits the experts of every decoder layer side by side."""
    layers = {layer for expert in experts for layer in expert.layers}
    rank = max((sum(expert.rank for expert in experts if layer in expert.layers) for layer in layers), default=1)
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)


# --- the template, and the filters that turn values into Markdown ---


class Markdown(str):
    """Text that is already Markdown, so that it is not escaped again."""

    __slots__ = ()


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        finalize=lambda value: value if isinstance(value, Markdown) else escape_markdown(value),
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    environment.filters |= {
        "code": code_span,
        "code_list": lambda values: Markdown(", ".join(map(code_span, values))),
        "figure": figure,
        "ranges": layer_ranges,
        "verbatim": verbatim,
    }
    return environment.get_template(TEMPLATE.name)


def escape_markdown(value: object) -> Markdown:
    r"""Return inline Markdown that renders as exactly this text, or `-` if there is no value.

    >>> print(escape_markdown("<b>*new*</b>\n[x](y) www.z"))
    \<b\>\*new\*\</b\> \[x\]\(y\) www\.z
    """
    if value is None or isinstance(value, Undefined):
        return Markdown("-")
    return Markdown(_MARKUP.sub(r"\\\1", " ".join(_without_controls(str(value)).split())))


def code_span(value: object) -> Markdown:
    """Return a code span, or escaped text if a code span could not hold it."""
    return Markdown(f"`{value}`") if _PLAIN.fullmatch(str(value)) and value is not None else escape_markdown(value)


def verbatim(value: object) -> Markdown:
    """Return text for a fenced code block, without characters that are special to Markdown, a shell or Python."""
    return Markdown(_NOT_VERBATIM.sub("", str(value)))


def figure(value: object) -> Markdown:
    """Return a number with four significant digits, or `-` for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Markdown(f"{value:z.4g}" if is_number else "-")


def layer_ranges(layers: Iterable[int]) -> Markdown:
    """Return layer indices with consecutive ones joined.

    >>> print(layer_ranges((2, 3, 4, 7)))
    2-4, 7
    """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return Markdown(", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs))


def _without_controls(text: str) -> str:
    return _CONTROLS.sub(" ", text)
