"""AdapterConfig: what an adapter_config.json of PEFT says, or by name why such an adapter cannot be a domain's experts.

An expert is a product B A for each linear module of a decoder layer, under one scale. Whatever PEFT saves that is more
than that would be lost, so it is refused, never left out. A key that this program does not know is refused, too, unless
it is switched off.

The rules by which PEFT finds modules, ranks and alphas are PEFT's own (tuners_utils.check_target_module_exists and
utils.other.get_pattern_key of version 0.21). Its patterns are regular expressions, and here a stranger's: all of one
adapter together get some seconds.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ...domains.errors import IncompatibleError, IntegrityError
from ..store.strict_json import JsonObject, parse_json

ALL_LINEAR: Final = "all-linear"
MATCHING_S: Final = 5.0  # for all patterns of one adapter

# keys that say nothing of what the saved adapter computes
_IDLE: Final = frozenset(
    {
        *("auto_mapping", "ensure_weight_tying", "inference_mode", "lora_dropout", "megatron_core", "merge_weights"),
        *("peft_version", "qalora_group_size", "runtime_config"),
        # settings of an initialisation or of training; `init_lora_weights` says which one was used
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"),
    }
)
_READ: Final = frozenset(
    {
        *("alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights"),
        *("layers_pattern", "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern", "revision"),
        *("target_modules", "task_type", "use_rslora"),
    }
)
# keys that, switched on, make the adapter more than B A
_REFUSED: Final = {
    "alora_invocation_tokens": "it is an activated LoRA (aLoRA), which is off before certain words of the prompt",
    "arrow_config": "it is an Arrow router over other adapters, not an adapter",
    "kasa_config": "KaSA cuts small singular values out of the base model's weights",
    "layer_replication": "it was trained on a base model whose layers are repeated",
    "lora_bias": "its B has a bias; a bias is no part of B A",
    "megatron_config": "it is an adapter of Megatron's parallel layers",
    "modules_to_save": "it brings whole modules of the base model along, which would replace the shared ones",
    "monteclora_config": "MonteCLoRA samples its matrices; B A would be one sample",
    "target_parameters": "it extends bare parameters, which are no linear modules",
    "trainable_token_indices": "it brings its own rows of the embedding, which would replace the shared ones",
    "use_bdlora": "BD-LoRA saves blocks of B and A, not B and A",
    "use_dora": "DoRA rescales the base model's weights by a saved magnitude; that is no part of B A",
    "use_qalora": "QA-LoRA pools the input before A",
}
_INITIALISATIONS: Final = ("eva", "gaussian", "mica", "orthogonal")  # that leave the base model as it is
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")  # first parts of names
_CONVERT: Final = (
    "save it again with PEFT: model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial_folder)"
)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter that can be imported."""

    base: str | None  # what it calls its base model: a Hub id, or the path of a folder
    revision: str | None  # of the base model
    rank: int
    alpha: float
    is_rslora: bool
    targets: str | tuple[str, ...]  # a pattern, or last parts of module paths
    excluded: str | tuple[str, ...]
    layers: frozenset[int]  # only these; empty: all
    layers_patterns: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    peft_version: str | None


def read_config(data: bytes, *, source: str) -> AdapterConfig:
    """The config of an adapter.

    Raises:
        IntegrityError: It is not JSON, or a value is of the wrong type.
        IncompatibleError: The adapter cannot be imported; says what it has that an expert cannot have.
    """
    found = parse_json(data, source=source)
    if not isinstance(found, dict):
        raise IntegrityError(f"{source} is no object.", fix="give a folder that PEFT saved")
    _check_kind(found, source)
    _check_initialisation(found.get("init_lora_weights", True), source)
    for key, value in found.items():
        if value and key in _REFUSED:
            raise _refused(source, _REFUSED[key], found=f"{key} is {_short(value)}")
        if value and key not in _IDLE | _READ | _REFUSED.keys():
            raise _refused(source, "it has a setting that this program does not know", found=f"{key}: {_short(value)}")
    values = _Values(found, source)
    return AdapterConfig(
        base=values.text("base_model_name_or_path"),
        revision=values.text("revision"),
        rank=values.rank(found.get("r"), "r"),
        alpha=values.number(found.get("lora_alpha"), "lora_alpha"),
        is_rslora=bool(found.get("use_rslora")),
        targets=_targets(values, source),
        excluded=values.names("exclude_modules"),
        layers=values.layers(),
        layers_patterns=_as_tuple(values.names("layers_pattern")),
        rank_pattern={key: values.rank(rank, "rank_pattern") for key, rank in values.items("rank_pattern")},
        alpha_pattern={key: values.number(alpha, "alpha_pattern") for key, alpha in values.items("alpha_pattern")},
        peft_version=values.text("peft_version"),
    )


class ModuleRules:
    """Which modules an adapter extends, and with which rank and alpha, by PEFT's rules."""

    def __init__(self, config: AdapterConfig):
        self._config = config
        self._matcher = _Matcher()

    def chosen(self, modules: Iterable[str], *, linear: Iterable[str]) -> list[str]:
        """The paths of the modules that the adapter extends.

        Args:
            modules: Paths of all modules of the base model.
            linear: Those of its linear modules but the output layer: what `all-linear` means.
        """
        config = self._config
        if isinstance(config.targets, str) and config.targets.lower() == ALL_LINEAR:
            return [path for path in linear if not self._is_excluded(path)]
        return [path for path in modules if not self._is_excluded(path) and self._is_target(path)]

    def rank(self, path: str) -> int:
        """The rank of a module's matrices; of several patterns that fit, the first says it."""
        return next(iter(self._fitting(self._config.rank_pattern, path)), self._config.rank)

    def alpha(self, path: str) -> float:
        """The alpha of a module.

        Raises:
            IncompatibleError: Several patterns fit and differ. PEFT takes the first, but sorts them when it saves.
        """
        found = list(self._fitting(self._config.alpha_pattern, path))
        if len(set(found)) > 1:
            raise IncompatibleError(
                "The scale of the adapter is not certain.",
                cause=f"several patterns of alpha_pattern fit {path}: {', '.join(map(str, found))}; PEFT takes the"
                " first of them, and loses their order when it saves",
                fix="write patterns of which one fits each module into its adapter_config.json",
            )
        return found[0] if found else self._config.alpha

    def scale(self, path: str) -> float:
        """The factor between B A x and the update of a module."""
        rank = self.rank(path)
        return self.alpha(path) / (rank**0.5 if self._config.is_rslora else rank)

    def _fitting(self, patterns: Mapping[str, Any], path: str) -> Iterator[Any]:
        """The values of the patterns that fit the end of the path."""
        return (value for key, value in patterns.items() if self._matcher.matches(rf"(.*\.)?({key})$", path))

    def _is_excluded(self, path: str) -> bool:
        excluded = self._config.excluded
        if isinstance(excluded, str):
            return bool(excluded) and self._matcher.matches_whole(excluded, path)
        return _is_named(excluded, path)

    def _is_target(self, path: str) -> bool:
        targets = self._config.targets
        if isinstance(targets, str):
            return self._matcher.matches_whole(targets, path)
        if path in targets:  # a whole path is not asked for its layer
            return True
        return _is_named(targets, path) and (not self._config.layers or self._layer(path) in self._config.layers)

    def _layer(self, path: str) -> int | None:
        if not self._config.layers_patterns:
            found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", path)
            return int(found["index"]) if found else None
        for pattern in self._config.layers_patterns:
            index = self._matcher.group(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path, "index")
            if index is not None:
                return int(index)
        return None


class _Matcher:
    """Regular expressions of a stranger: they may be wrong, and may take for ever."""

    def __init__(self) -> None:
        self._left_s = MATCHING_S

    def matches(self, pattern: str, text: str) -> bool:
        return self._match(pattern, text, is_whole=False) is not None

    def matches_whole(self, pattern: str, text: str) -> bool:
        return self._match(pattern, text, is_whole=True) is not None

    def group(self, pattern: str, text: str, name: str) -> str | None:
        found = self._match(pattern, text, is_whole=False)
        return None if found is None else found[name]

    def _match(self, pattern: str, text: str, *, is_whole: bool) -> Any:
        import regex  # transformers needs it anyhow; unlike re it can be told to stop

        start = time.monotonic()
        try:
            match = regex.fullmatch if is_whole else regex.match
            return match(pattern, text, timeout=max(self._left_s, 0.001))
        except TimeoutError as error:
            cause = f"its patterns take more than {MATCHING_S:g} s; last: {_short(pattern)}"
            raise IncompatibleError("A pattern of the adapter takes too long.", cause=cause) from error
        except regex.error as error:
            cause = f"{_short(pattern)}: {error}"
            raise IntegrityError("A pattern of the adapter is no regular expression.", cause=cause) from error
        finally:
            self._left_s -= time.monotonic() - start


class _Values:
    """The values of a config, each of the right type or refused."""

    def __init__(self, found: JsonObject, source: str):
        self._found, self._source = found, source

    def text(self, key: str) -> str | None:
        value = self._found.get(key)
        return self._taken(value or None, key, "text", value is None or isinstance(value, str))

    def names(self, key: str) -> str | tuple[str, ...]:
        value = self._found.get(key) or ()
        is_list = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        self._taken(value, key, "text or a list of names", isinstance(value, str) or is_list)
        return value if isinstance(value, str) else tuple(value)

    def items(self, key: str) -> list[tuple[str, Any]]:
        value = self._found.get(key) or {}
        return list(self._taken(value, key, "an object", isinstance(value, dict)).items())

    def layers(self) -> frozenset[int]:
        value = self._found.get("layers_to_transform")
        numbers = [] if value is None else value if isinstance(value, list) else [value]
        fits = all(type(number) is int for number in numbers)
        return frozenset(self._taken(numbers, "layers_to_transform", "layer numbers", fits))

    def rank(self, value: Any, key: str) -> int:
        return self._taken(value, key, "a positive whole number", type(value) is int and value > 0)

    def number(self, value: Any, key: str) -> float:
        return float(self._taken(value, key, "a number", type(value) in (int, float)))

    def _taken(self, value: Any, key: str, kind: str, fits: bool) -> Any:
        if not fits:
            raise IntegrityError(f"{self._source} is damaged.", cause=f"{key} should be {kind}, it is {_short(value)}")
        return value


def _check_kind(found: JsonObject, source: str) -> None:
    if found.get("peft_type") != "LORA":
        reason = "experts are LoRA pairs; other methods change the base model in other ways"
        raise _refused(source, reason, found=f"peft_type is {_short(found.get('peft_type'))}")
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        reason = "only adapters of causal language models can be experts"
        raise _refused(source, reason, found=f"task_type is {_short(found['task_type'])}")
    if found.get("bias", "none") != "none":
        reason = "it trained biases of the base model, which are shared and stay frozen"
        raise _refused(source, reason, found=f"bias is {_short(found['bias'])}")


def _check_initialisation(value: Any, source: str) -> None:
    if isinstance(value, bool) or value in _INITIALISATIONS:
        return
    said = f"init_lora_weights is {_short(value)}"
    if isinstance(value, str) and value.lower().startswith(_CHANGES_BASE):
        reason = (
            "this initialisation took a part out of the base model's weights, so the adapter fits those weights only"
        )
        raise _refused(source, reason, found=said, fix=_CONVERT)
    raise _refused(source, "it has an initialisation that this program does not know", found=said)


def _targets(values: _Values, source: str) -> str | tuple[str, ...]:
    targets = values.names("target_modules")
    if not targets:
        raise _refused(source, "it does not say which modules it extends", found="target_modules is empty")
    return targets


def _refused(source: str, reason: str, *, found: str, fix: str | None = None) -> IncompatibleError:
    return IncompatibleError(f"{source}: this adapter cannot be imported.", cause=f"{found}: {reason}", fix=fix)


def _is_named(names: Iterable[str], path: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
