"""Read an adapter_config.json of PEFT, or refuse it with the setting that cannot be imported.

An expert is a product B A per linear module of a decoder layer, with one scale. A PEFT setting that computes more than
that is refused, because it would be lost. So is an unknown setting, unless it is off.

Target modules, ranks and alphas are matched by the rules of PEFT (tuners_utils.check_target_module_exists and
utils.other.get_pattern_key of version 0.21). Patterns are untrusted regular expressions, so all patterns of an adapter
together have a time limit.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ...domains.errors import IncompatibleError, IntegrityError
from ..store.strict_json import JsonObject, parse_json

ALL_LINEAR: Final = "all-linear"
MATCHING_TIMEOUT_S: Final = 5.0  # for all patterns of an adapter together

# keys that do not change what the saved adapter computes
_IGNORED_KEYS: Final = frozenset(
    {
        *("auto_mapping", "ensure_weight_tying", "inference_mode", "lora_dropout", "megatron_core", "merge_weights"),
        *("peft_version", "qalora_group_size", "runtime_config"),
        # settings of an initialisation or of training; `init_lora_weights` names the one that was used
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"),
    }
)
_READ_KEYS: Final = frozenset(
    {
        *("alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights"),
        *("layers_pattern", "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern", "revision"),
        *("target_modules", "target_parameters", "task_type", "use_rslora"),
    }
)
# keys that, if set, make the adapter compute more than B A
_UNSUPPORTED_KEYS: Final = {
    "alora_invocation_tokens": "it is an activated LoRA (aLoRA), which is off before its invocation tokens",
    "arrow_config": "it is an Arrow router over other adapters, not an adapter",
    "kasa_config": "KaSA removes small singular values from the base model's weights",
    "layer_replication": "it was trained on a base model with replicated layers",
    "lora_bias": "its B has a bias, which is not part of B A",
    "megatron_config": "it adapts Megatron's parallel layers",
    "modules_to_save": "it contains full copies of base model modules, which would replace the shared ones",
    "monteclora_config": "MonteCLoRA samples its matrices; B A would be one sample",
    "trainable_token_indices": "it contains trained embedding rows, which would replace the shared ones",
    "use_bdlora": "BD-LoRA saves blocks of B and A",
    "use_dora": "DoRA rescales the base model's weights by a saved magnitude, which is not part of B A",
    "use_qalora": "QA-LoRA pools the input before A",
}
_PLAIN_INITIALISATIONS: Final = ("eva", "gaussian", "mica", "orthogonal")  # base model unchanged
_BASE_CHANGING_INITIALISATIONS: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")  # prefixes
_CONVERT: Final = (
    "save it again with PEFT: model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial_folder)"
)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of a LoRA adapter that can be imported."""

    base: str | None  # Hub id or folder of its base model
    revision: str | None  # of the base model
    rank: int
    alpha: float
    is_rslora: bool
    targets: str | tuple[str, ...]  # a pattern, or suffixes of module paths
    parameters: tuple[str, ...]  # suffixes of paths of weights, each a module's
    excluded: str | tuple[str, ...]
    layers: frozenset[int]  # layers_to_transform; empty for all
    layers_patterns: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    peft_version: str | None


def read_config(data: bytes, *, source: str) -> AdapterConfig:
    """Parse an adapter_config.json.

    Raises:
        IntegrityError: It is not a JSON object, or a value has the wrong type.
        IncompatibleError: The adapter is more than plain LoRA; the error names the setting.
    """
    found = parse_json(data, source=source)
    if not isinstance(found, dict):
        raise IntegrityError(f"{source} is not a JSON object.", fix="pass a folder written by PEFT's save_pretrained")
    _check_method(found, source)
    _check_initialisation(found.get("init_lora_weights", True), source)
    for key, value in found.items():
        if value and key in _UNSUPPORTED_KEYS:
            raise _unsupported(source, _UNSUPPORTED_KEYS[key], found=f"{key} is {_short(value)}")
        if value and key not in _IGNORED_KEYS | _READ_KEYS | _UNSUPPORTED_KEYS.keys():
            raise _unsupported(source, "this setting is unknown", found=f"{key}: {_short(value)}")
    values = _ConfigValues(found, source)
    return AdapterConfig(
        base=values.text("base_model_name_or_path"),
        revision=values.text("revision"),
        rank=values.rank(found.get("r"), "r"),
        alpha=values.number(found.get("lora_alpha"), "lora_alpha"),
        is_rslora=bool(found.get("use_rslora")),
        targets=_targets(values, source),
        parameters=_parameters(values, source),
        excluded=values.names("exclude_modules"),
        layers=values.layers(),
        layers_patterns=_to_tuple(values.names("layers_pattern")),
        rank_pattern={key: values.rank(rank, "rank_pattern") for key, rank in values.items("rank_pattern")},
        alpha_pattern={key: values.number(alpha, "alpha_pattern") for key, alpha in values.items("alpha_pattern")},
        peft_version=values.text("peft_version"),
    )


class TargetMatcher:
    """Target modules of an adapter, their ranks and alphas, matched by PEFT's rules."""

    def __init__(self, config: AdapterConfig):
        self._config = config
        self._regex = _TimedRegex()

    def find_targets(self, modules: Iterable[str], *, linear: Iterable[str]) -> list[str]:
        """Return the paths of the target modules.

        Args:
            modules: Paths of all modules of the base model.
            linear: Paths of its linear modules except the output layer, for `all-linear`.
        """
        config = self._config
        if isinstance(config.targets, str) and config.targets.lower() == ALL_LINEAR:
            return [path for path in linear if not self._is_excluded(path) or self.has_target_weight(path)]
        return [
            path
            for path in modules
            if (not self._is_excluded(path) and self._is_target(path)) or self.has_target_weight(path)
        ]

    def rank(self, path: str) -> int:
        """Return the rank of a module, from the first matching pattern."""
        return next(iter(self._fitting(self._config.rank_pattern, path)), self._config.rank)

    def has_target_weight(self, path: str) -> bool:
        """Return whether `target_parameters` names the weight of the module."""
        return _matches_suffix(self._config.parameters, f"{path}.weight")

    def alpha(self, path: str) -> float:
        """Return the alpha of a module.

        Raises:
            IncompatibleError: Several patterns match with different values. PEFT uses the first, but sorts them when it
                saves.
        """
        found = list(self._fitting(self._config.alpha_pattern, path))
        if len(set(found)) > 1:
            raise IncompatibleError(
                "The scale of the adapter is ambiguous.",
                cause=f"several patterns of alpha_pattern match {path}: {', '.join(map(str, found))}; PEFT uses the"
                " first, and loses their order when it saves",
                fix="edit alpha_pattern in its adapter_config.json so that one pattern matches each module",
            )
        return found[0] if found else self._config.alpha

    def scale(self, path: str) -> float:
        """Return the LoRA scaling of a module, alpha / rank or alpha / sqrt(rank)."""
        rank = self.rank(path)
        return self.alpha(path) / (rank**0.5 if self._config.is_rslora else rank)

    def _fitting(self, patterns: Mapping[str, Any], path: str) -> Iterator[Any]:
        """Yield the values of the patterns that match the end of the path, or its weight's if that is the target."""
        path = f"{path}.weight" if self.has_target_weight(path) else path
        return (value for key, value in patterns.items() if self._regex.matches(rf"(.*\.)?({key})$", path))

    def _is_excluded(self, path: str) -> bool:
        excluded = self._config.excluded
        if isinstance(excluded, str):
            return bool(excluded) and self._regex.full_match(excluded, path)
        return _matches_suffix(excluded, path)

    def _is_target(self, path: str) -> bool:
        targets = self._config.targets
        if isinstance(targets, str):
            return self._regex.full_match(targets, path)
        if path in targets:  # layers_to_transform does not apply to a full path
            return True
        return _matches_suffix(targets, path) and (not self._config.layers or self._layer(path) in self._config.layers)

    def _layer(self, path: str) -> int | None:
        if not self._config.layers_patterns:
            found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", path)
            return int(found["index"]) if found else None
        for pattern in self._config.layers_patterns:
            index = self._regex.group(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path, "index")
            if index is not None:
                return int(index)
        return None


class _TimedRegex:
    """Matcher of untrusted regular expressions, which may be invalid or take exponential time."""

    def __init__(self) -> None:
        self._left_s = MATCHING_TIMEOUT_S

    def matches(self, pattern: str, text: str) -> bool:
        return self._match(pattern, text, full=False) is not None

    def full_match(self, pattern: str, text: str) -> bool:
        return self._match(pattern, text, full=True) is not None

    def group(self, pattern: str, text: str, name: str) -> str | None:
        found = self._match(pattern, text, full=False)
        return None if found is None else found[name]

    def _match(self, pattern: str, text: str, *, full: bool) -> Any:
        import regex  # a dependency of transformers; unlike re it has a timeout

        start = time.monotonic()
        try:
            match = regex.fullmatch if full else regex.match
            return match(pattern, text, timeout=max(self._left_s, 0.001))
        except TimeoutError as error:
            cause = f"its patterns took more than {MATCHING_TIMEOUT_S:g} s; the last one was {_short(pattern)}"
            raise IncompatibleError("A pattern of the adapter takes too long.", cause=cause) from error
        except regex.error as error:
            cause = f"{_short(pattern)}: {error}"
            raise IntegrityError("A pattern of the adapter is not a valid regular expression.", cause=cause) from error
        finally:
            self._left_s -= time.monotonic() - start


class _ConfigValues:
    """Typed access to the values of a config."""

    def __init__(self, found: JsonObject, source: str):
        self._found, self._source = found, source

    def text(self, key: str) -> str | None:
        value = self._found.get(key)
        return self._check_type(value or None, key, "text", value is None or isinstance(value, str))

    def names(self, key: str) -> str | tuple[str, ...]:
        value = self._found.get(key) or ()
        is_list = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        self._check_type(value, key, "text or a list of names", isinstance(value, str) or is_list)
        return value if isinstance(value, str) else tuple(value)

    def items(self, key: str) -> list[tuple[str, Any]]:
        value = self._found.get(key) or {}
        return list(self._check_type(value, key, "an object", isinstance(value, dict)).items())

    def layers(self) -> frozenset[int]:
        value = self._found.get("layers_to_transform")
        numbers = [] if value is None else value if isinstance(value, list) else [value]
        fits = all(type(number) is int for number in numbers)
        return frozenset(self._check_type(numbers, "layers_to_transform", "layer numbers", fits))

    def rank(self, value: Any, key: str) -> int:
        return self._check_type(value, key, "a positive integer", type(value) is int and value > 0)

    def number(self, value: Any, key: str) -> float:
        return float(self._check_type(value, key, "a number", type(value) in (int, float)))

    def _check_type(self, value: Any, key: str, kind: str, fits: bool) -> Any:
        if not fits:
            raise IntegrityError(f"{self._source} is damaged.", cause=f"{key} must be {kind}, not {_short(value)}")
        return value


def _check_method(found: JsonObject, source: str) -> None:
    if found.get("peft_type") != "LORA":
        reason = "only LoRA can be imported"
        raise _unsupported(source, reason, found=f"peft_type is {_short(found.get('peft_type'))}")
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        reason = "only adapters of causal language models can be imported"
        raise _unsupported(source, reason, found=f"task_type is {_short(found['task_type'])}")
    if found.get("bias", "none") != "none":
        reason = "it contains trained biases of the base model, which are shared and frozen"
        raise _unsupported(source, reason, found=f"bias is {_short(found['bias'])}")


def _check_initialisation(value: Any, source: str) -> None:
    if isinstance(value, bool) or value in _PLAIN_INITIALISATIONS:
        return
    found = f"init_lora_weights is {_short(value)}"
    if isinstance(value, str) and value.lower().startswith(_BASE_CHANGING_INITIALISATIONS):
        reason = "this initialisation changes the base model's weights, and the adapter fits the changed weights only"
        raise _unsupported(source, reason, found=found, fix=_CONVERT)
    raise _unsupported(source, "this initialisation is unknown", found=found)


def _targets(values: _ConfigValues, source: str) -> str | tuple[str, ...]:
    targets = values.names("target_modules")
    if not targets and not values.names("target_parameters"):
        raise _unsupported(source, "no module is targeted", found="target_modules is empty")
    return targets


def _parameters(values: _ConfigValues, source: str) -> tuple[str, ...]:
    names = _to_tuple(values.names("target_parameters"))
    others = [name for name in names if not name.endswith(".weight")]
    if others:
        found = f"target_parameters has {_short(others[0])}"
        raise _unsupported(source, "it targets parameters that are not linear modules", found=found)
    return names


def _unsupported(source: str, reason: str, *, found: str, fix: str | None = None) -> IncompatibleError:
    return IncompatibleError(f"{source}: this adapter cannot be imported.", cause=f"{found}: {reason}", fix=fix)


def _matches_suffix(names: Iterable[str], path: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _to_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
