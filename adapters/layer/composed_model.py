"""ComposedModel: the class of a composed model, between that of its base and what experts, gates and router need.

A composed model is an instance of its base's class with these methods in front. What cannot work on it is refused with
the command that does what was meant; what would be silently wrong is checked in every forward pass (base_check.py).
"""

import copy
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor
from transformers import PreTrainedModel

from ...domains.errors import InputError
from ..router.cache import positions_in
from .base_check import BaseCheck
from .fused import ExpertGroup
from .gates import LayerGates, device_only
from .routing import routing_of

if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object  # the base's class follows in the order of resolution


@cache
def composed_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of models composed over models of class `base`: a subclass with its name."""
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (ComposedModel, base), named)


class ComposedModel(_Base):
    """Methods of a composed model that differ from those of its base's class."""

    base_check: BaseCheck

    # --- saving ---

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a merged composition as an ordinary transformers folder.

        Raises:
            InputError: The experts are not merged: no transformers folder can hold them.
        """
        self._check_merged("saved with save_pretrained")
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Push a merged composition as an ordinary transformers model.

        Raises:
            InputError: The experts are not merged.
        """
        self._check_merged("pushed with push_to_hub")
        return super().push_to_hub(*args, **kwargs)

    def _check_merged(self, what: str) -> None:
        if getattr(self, "merged", None) is None:
            text = self._composition()
            # in one line: Trainer and Hub tools log the text of an exception line by line
            raise InputError(
                f"A composed model cannot be {what}, because a transformers folder has no place for its experts, gates "
                f"and router: registry compose {text} --out FOLDER saves the composition, and registry export {text} "
                "--to merged --static --out FOLDER writes a transformers model with constant gates."
            )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InputError(
            "A composed model cannot be pickled.",
            cause="lorary neither writes nor reads pickles, and so neither does torch.save of a composed model",
            fix=f"registry compose {self._composition()} --out FOLDER saves the composition; copy.deepcopy copies it",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "ComposedModel":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[operator]
        return twin

    # --- tensors ---

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """Return all tensors of the composition: the base's, and those of experts, gates and router.

        Those of fused modules have other names than in the base (`q_proj.base.weight`). A merged composition has the
        base's names, with merged weights.
        """
        found = super().state_dict(*args, prefix=prefix, **kwargs)
        if getattr(self, "merged", None) is None:
            keep = bool(kwargs.get("keep_vars"))
            for name, tensor in self._expert_tensors():
                found[prefix + name] = tensor if keep else tensor.detach()
        return found

    def _expert_tensors(self) -> list[tuple[str, Tensor]]:
        modules: list[tuple[str, Any]] = [
            (name, module) for name, module in super().named_modules() if isinstance(module, ExpertGroup | LayerGates)
        ]
        router = routing_of(self).router
        if router is not None:
            modules.append(("router", router))
        return [
            (f"{path}.{name}", buffer)
            for path, module in modules
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to write to parameters.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "A state dict cannot be loaded into a composed model.",
            cause="it shares the weights of its base with other compositions",
            fix="load it into the base model, then compose again",
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters of the base and, unless merged, of experts and gates.

        Frozen experts are buffers, so `parameters()` yields those of the base and of a bank in training.
        """
        count = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable or getattr(self, "merged", None) is not None:
            return count
        return count + sum(
            tensor.numel()
            for name, tensor in self._expert_tensors()
            if not name.startswith("router.") and name.rpartition(".")[2].startswith(("A", "Bt", "rows"))
        )

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        """Move or cast the composition alone: its base and others over it stay; gates and router stay float32.

        Raises:
            InputError: A weight is quantised and therefore the base's own object.
        """
        for weight in self.base_check.shared:
            moved = fn(weight)
            if moved.device != weight.device or moved.dtype != weight.dtype:
                raise InputError(
                    "A composition over a quantised base model cannot be moved or cast.",
                    cause=f"they share {weight.dtype} on {weight.device}; {moved.dtype} on {moved.device} is asked for",
                    fix="load the base model where it is needed (Registry.open(store, device=...)), then compose again",
                )
        routing = routing_of(self)
        if routing.router is not None:  # a copy: other compositions may have the same router
            routing.router = copy.deepcopy(routing.router)._apply(device_only(fn))
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise InputError(
            "A composed model cannot run in nn.DataParallel.",
            cause="its replicas would share one state of routing",
            fix="use one GPU (CUDA_VISIBLE_DEVICES=0), or one process for each (torchrun)",
        )

    # --- generation ---

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate; inside `reading_prompts()`, the input is the prompt, however it is passed to forward passes.

        Its gates depend on its end, so it is read at once, with a warning if `prefill_chunk_size` would cut it.
        """
        ids = kwargs.get("input_ids") if inputs is None else inputs
        settings, cache = routing_of(self).settings, kwargs.get("past_key_values")
        is_whole = getattr(self, "merged", None) is None and settings.prompts is not None
        if is_whole and ids is not None and (cache is None or positions_in(cache) == 0):
            if settings.longest_prompt is None:
                with routing_of(self).reading_prompts(ids.shape[1]):
                    return self.generate(inputs, generation_config, *args, **kwargs)
            config = self.generation_config if generation_config is None else generation_config
            chunk = kwargs.get("prefill_chunk_size", config.prefill_chunk_size)
            if chunk is not None and chunk < ids.shape[1]:
                warnings.warn(f"The prompt is read as a whole: prefill_chunk_size={chunk} is ignored.", stacklevel=2)
                # larger than any prompt; None would be replaced by the value of the model's own config
                kwargs["prefill_chunk_size"] = ids.shape[1]
        base: Any = super()
        return base.generate(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Return the manager of continuous batching, for a merged composition.

        Raises:
            InputError: The experts are not merged.
        """
        if getattr(self, "merged", None) is None:
            text = self._composition()
            raise InputError(
                "A composed model cannot run continuous batching.",
                cause="its paged cache has no place for the router's sums",
                fix=f"call generate, or merge_experts on a static composition; registry export {text} --to vllm writes "
                "adapters for a server",
            )
        base: Any = super()
        return base.init_continuous_batching(*args, **kwargs)

    # --- changes of the architecture ---

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Return the embeddings, which keep their size.

        Raises:
            InputError: Another size is asked for.
        """
        embeddings: Any = self.get_input_embeddings()
        if new_num_tokens is None or new_num_tokens == len(embeddings.weight):
            return embeddings
        raise InputError(
            "The vocabulary of a composed model cannot be resized.",
            cause=f"its router has evidence for {len(embeddings.weight)} tokens, {new_num_tokens} are asked for",
            fix="resize and save the base model, then create a registry for it: registry init --base FOLDER",
        )

    def add_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse a PEFT adapter.

        Raises:
            InputError: Always.
        """
        self._refuse_adapter()

    def load_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse a PEFT adapter.

        Raises:
            InputError: Always.
        """
        self._refuse_adapter()

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Return the modules with their paths.

        Raises:
            InputError: PEFT asks, to replace some of them.
        """
        if _is_called_by("peft"):  # which asks a model nothing else before it replaces its modules
            self._refuse_adapter()
        return super().named_modules(*args, **kwargs)

    def _refuse_adapter(self) -> NoReturn:
        raise InputError(
            "A PEFT adapter cannot be added to a composed model.",
            cause=f"its modules have the experts of {', '.join(routing_of(self).stack.names)} already",
            fix="registry import NAME FOLDER makes an adapter a domain, which can be composed with others",
        )

    def _composition(self) -> str:
        plan = getattr(self, "composition", None)
        names = routing_of(self).stack.names
        return "+".join(names[1:] or names) if plan is None else str(plan.composition)


def _is_called_by(package: str, frames: int = 8) -> bool:
    """Return whether one of the innermost functions that are running belongs to `package`."""
    frame = sys._getframe()
    for _ in range(frames):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith(f"{package}."):
            return True
        frame = frame.f_back
    return False
