"""Routing: compute the slot gates of a forward pass, and the hooks that do so in a composed model.

The decoder's forward runs under its own ForwardState. The first decoder layer with experts computes the slot gates, and
each layer with experts its own gates. Settings of a caller (prompts read as a whole, fixed slots) apply only in the
thread or asyncio task that opened them (settings.py).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...domains.base_model import ModelLayout, bind_arguments, first_tensor
from ...domains.errors import InputError
from ...domains.statistics.fading import faded_sums
from ..router.cache import check_cache, find_cache, positions_in, router_layer, seen_by_themselves
from ..router.packed import text_ends, text_starts
from ..router.router import DomainRouter, last_tokens, whole_prompts
from .active import Part, close_small_gates, plan_parts
from .forward_state import (
    ForwardState,
    OpenGates,
    StateCarrier,
    outer_inputs,
    run_with,
    run_with_inputs,
    running_state,
)
from .gates import LayerGates
from .settings import Settings, changed_settings, settings_of
from .stack import Stack
from .stacked import StackedComposition


class Route(NamedTuple):
    """Slot gates of one forward pass."""

    slot_gate: Float[Tensor, "batch seq slots"]  # on the CPU
    past: int  # positions in the key-value cache before this forward pass


class Routing:
    """Routing configuration of a composed model, `model.routing`; holds no state of a forward pass."""

    def __init__(
        self,
        stack: Stack | StackedComposition,
        layout: ModelLayout,
        router: DomainRouter | None,
        fixed: Float[Tensor, " slots"] | None,
        threshold: float,
    ):
        self.stack = stack
        self.layout = layout
        self.router = router
        self.threshold = threshold
        self.fixed = fixed  # constant slot gates, used instead of the router's

    @property
    def settings(self) -> Settings:
        """Settings of this model in the current context."""
        return settings_of(self)

    @property
    def fixed_here(self) -> Float[Tensor, " slots"] | None:
        """Constant slot gates in the current context: those of `fixed_slots` if open, else those of `attach`."""
        fixed = self.settings.fixed
        return self.fixed if fixed is None else fixed

    def reading_prompts(self, lengths: int | Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Return a context manager in which all positions of a prompt use the slot gates of its last position.

        Slot gates are causal otherwise, as text that is predicted token by token requires. A prompt is known in full,
        and its first tokens say little about its domain: computed with other gates, their keys and values degrade the
        answer (measured in docs/log.md). Only a forward pass with an empty cache, or without one, reads a prompt; later
        positions are causal. The setting applies to forward passes of the thread or asyncio task that opened it.

        Each text of a packed row is a prompt.

        Args:
            lengths: Length of each row's prompt including left padding, or one number for all rows. None: all positions
                of a forward pass with an empty cache; in `generate`, its input.

        A forward pass that reads only a part of a prompt of given length raises an InputError. `generate` reads it at
        once, and warns that it ignores `prefill_chunk_size`.
        """
        given = torch.iinfo(torch.int64).max if lengths is None else lengths
        prompts = torch.tensor(given, dtype=torch.int64).reshape(-1)
        longest = None if lengths is None else int(prompts.max())
        return changed_settings(self, prompts=prompts, longest_prompt=longest)

    def running(self) -> ForwardState:
        """Return the state of the forward pass of this model running in this thread.

        Raises:
            RuntimeError: If there is none.
        """
        state = running_state()
        if state is None or state.owner is not self:
            raise RuntimeError("A decoder layer with experts ran outside a forward pass of its composed model.")
        return state

    def find_slot_gates(self, state: ForwardState, hidden: Tensor, cache: Any) -> None:
        """Store the slot gates and the parts to compute in `state`."""
        settings = self.settings
        with torch.no_grad():
            slot_gate = close_small_gates(self._slot_gate(state, settings, hidden, cache), self.threshold)
            found = state.slots
            found.gates, found.by_position = slot_gate, slot_gate.reshape(-1, slot_gate.shape[-1])
            found.parts = self._plan(slot_gate)
        if settings.routes is not None:
            settings.routes.append(Route(slot_gate.detach().cpu(), int(state.past)))

    def check_prompts(self, state: ForwardState) -> None:
        """Raise InputError if a forward pass cannot read prompts of the lengths that were set as a whole.

        Called before anything is computed, so that the cache stays as it was.
        """
        settings, ids = self.settings, state.input_ids
        if settings.prompts is None or settings.longest_prompt is None or self.fixed_here is not None or ids is None:
            return
        (batch, seq), longest = ids.shape, settings.longest_prompt
        if len(settings.prompts) not in (1, batch):
            raise InputError(
                "The lengths of the prompts do not fit the batch.",
                cause=f"there are {len(settings.prompts)} lengths for {batch} rows",
                fix="pass one length for left-padded prompts: reading_prompts(input_ids.shape[1])",
            )
        if isinstance(state.past, Tensor) and (state.past.is_cuda or torch.compiler.is_compiling()):
            return  # reading it would synchronize, or break the graph; `generate` passes prompts at once
        past = int(state.past)
        if longest > past and (past > 0 or longest > seq):
            raise InputError(
                "A prompt that is read as a whole was passed in parts.",
                cause=f"the prompt has {longest} tokens, and this forward pass reads {seq} after {past}",
                fix="pass it at once, or outside reading_prompts()",
            )

    def _plan(self, slot_gate: Float[Tensor, "batch seq slots"]) -> list[Part]:
        # reading values would synchronize a GPU and break a graph; there the kernels skip closed slots
        if not self.threshold or self.stack.trainable or slot_gate.is_cuda or torch.compiler.is_compiling():
            return [Part(0, slot_gate.shape[0] * slot_gate.shape[1], None)]
        return plan_parts(slot_gate)

    def _slot_gate(
        self, state: ForwardState, settings: Settings, hidden: Tensor, cache: Any
    ) -> Float[Tensor, "batch seq slots"]:
        fixed = self.fixed_here
        if fixed is not None:
            return fixed.to(hidden.device).expand(*hidden.shape[:2], -1)
        if self.router is None or state.input_ids is None:
            raise InputError(
                "This composition routes by its input tokens.",
                cause="the model was called with inputs_embeds instead of input_ids",
                fix="pass input_ids, or compose with --static",
            )
        starts = _text_starts(state, hidden)
        ends = self._prompt_ends(state, settings, hidden, starts)
        gates = self.router.slot_gates(self._sums(self.router, state, hidden, cache, starts, ends))
        if ends is None:
            return gates
        whole = whole_prompts(gates, ends)
        return torch.where(state.past == 0, whole, gates) if isinstance(state.past, Tensor) else whole

    def _prompt_ends(
        self, state: ForwardState, settings: Settings, hidden: Tensor, starts: Bool[Tensor, "batch seq"] | None
    ) -> Int64[Tensor, "batch #seq"] | None:
        """Return the last position of each prompt of this forward pass; None if it reads none as a whole."""
        if settings.prompts is None:
            return None
        if starts is not None and settings.longest_prompt is not None:
            raise InputError(
                "Prompts of given lengths cannot be packed.",
                cause="the position ids of a row start again",
                fix="read each text of packed rows as a prompt: reading_prompts()",
            )
        if isinstance(state.past, int) and state.past:
            return None
        if starts is not None:
            return text_ends(starts)
        batch, seq = hidden.shape[:2]
        return settings.prompts.to(hidden.device).clamp(max=seq).expand(batch)[:, None] - 1

    def _sums(
        self,
        router: DomainRouter,
        state: ForwardState,
        hidden: Tensor,
        cache: Any,
        starts: Bool[Tensor, "batch seq"] | None,
        ends: Int64[Tensor, "batch #seq"] | None,
    ) -> Float[Tensor, "batch seq sums"]:
        """Return the router's sums up to each new position, continuing from the cache if there is one."""
        ids = state.input_ids
        assert ids is not None
        is_real = _real_tokens(state, hidden, is_static=cache is not None and cache.is_compileable)
        is_text = router.text_mask(ids, is_real)
        kept = before = None
        if cache is not None:
            kept = router_layer(
                cache, past=state.past, layers=self.layout.count, sums=router.sums, router=router.identity
            )
            before = kept.last_tokens()
        last = last_tokens(ids, is_text, before, starts)
        increments = router.increments(ids, hidden, is_text, last).float()
        steps = router.steps(ids, is_text, starts=starts, prompt_ends=ends)
        if isinstance(state.past, Tensor) and ends is not None:  # a static cache: whether a prompt is read is not known
            steps = torch.where(state.past == 0, steps, router.steps(ids, is_text))
        return faded_sums(increments, steps) if kept is None else kept.append(increments, last[:, 1:], steps)


def _text_starts(state: ForwardState, hidden: Tensor) -> Bool[Tensor, "batch seq"] | None:
    """Return where the texts of packed rows start, under the conditions in which transformers separates them."""
    is_continued = not isinstance(state.past, int) or state.past > 0
    if hidden.shape[1] == 1 or is_continued:
        return None
    lengths = state.cumulative_lengths
    if lengths is None and state.mask is not None:
        return None
    starts = text_starts(hidden.shape[:2], state.position_ids, lengths)
    return None if starts is None else starts.to(hidden.device)


def _real_tokens(state: ForwardState, hidden: Tensor, *, is_static: bool) -> Bool[Tensor, "batch seq"]:
    """Return a mask of the new positions, True for text and False for padding."""
    shape, mask = hidden.shape[:2], state.mask
    if is_static and isinstance(mask, Mapping):  # one for each layer type
        mask = mask.get("full_attention", next(iter(mask.values())))
    is_made = is_static and isinstance(mask, Tensor) and mask.ndim == 4  # by `generate`, for one token at a time
    if mask is None or (is_made and shape[1] == 1):
        return torch.ones(shape, dtype=torch.bool, device=hidden.device)
    if is_made:
        return seen_by_themselves(mask, shape[1], state.past)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise InputError(
            "Routing needs an attention mask with one value per token.",
            cause="the mask is not a tensor of shape (batch, tokens)",
            fix="pass the attention_mask of the tokenizer",
        )
    # with a cache the mask also covers past positions; the new ones are its last columns
    return mask[:, -shape[1] :].to(device=hidden.device, dtype=torch.bool)


class RoutedForward:
    """Replacement for the decoder's `forward` in a composed model, which runs it under a new ForwardState."""

    def __init__(self, module: nn.Module, routing: Routing):
        self.module, self.routing, self.forward = module, routing, module.forward
        self.__signature__ = inspect.signature(module.forward)  # transformers and Trainer read it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward; its state is dropped even after an exception."""
        named = bind_arguments(self.module, args, kwargs)
        if named.get("write_index") is not None:
            raise InputError(
                "A composed model cannot run continuous batching.",
                cause="its paged cache has no place for the router's sums",
                fix="call generate, or merge_experts on a static composition",
            )
        cache = find_cache(named.values())
        if cache is not None:
            check_cache(cache, None if self.routing.router is None else self.routing.router.identity)
        past = 0 if cache is None else positions_in(cache)
        if named.get("input_ids") is None:
            named = _with_outer_inputs(named, outer_inputs(self.routing))
        state = ForwardState(
            self.routing,
            input_ids=named.get("input_ids"),
            mask=named.get("attention_mask"),
            position_ids=named.get("position_ids"),
            cumulative_lengths=named.get("cu_seq_lens_q"),
            past=past.clone() if isinstance(past, Tensor) else past,  # a static cache updates this tensor in place
        )
        self.routing.check_prompts(state)
        if torch.is_grad_enabled() and self.module.training and not torch.compiler.is_compiling():
            carry_state(self.module)
        return run_with(state, self.forward, *args, **kwargs)


class OuterForward:
    """Replacement for the `forward` of a module around the decoder, which keeps its inputs for RoutedForward."""

    def __init__(self, module: nn.Module, routing: Routing):
        self.module, self.routing, self.forward = module, routing, module.forward
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward; its inputs are dropped even after an exception."""
        return run_with_inputs(self.routing, bind_arguments(self.module, args, kwargs), self.forward, *args, **kwargs)


def route_forwards(model: nn.Module, routing: Routing) -> None:
    """Replace the `forward` of the decoder and of the modules around it that may call it with embeddings."""
    decoder = routing.layout.decoder
    decoder_module = model.get_submodule(decoder)
    decoder_module.forward = RoutedForward(decoder_module, routing)
    parents = decoder.split(".")[:-1]
    # a decoder directly in the model gets the model's own arguments
    for depth in range(len(parents) + 1 if parents else 0):
        module = model.get_submodule(".".join(parents[:depth]))
        module.forward = OuterForward(module, routing)


def restore_forwards(model: nn.Module) -> None:
    """Undo `route_forwards`."""
    for module in model.modules():
        routed = module.__dict__.get("forward")
        if isinstance(routed, RoutedForward | OuterForward):
            del module.forward
            if module.forward != routed.forward:  # an instance attribute, as accelerate sets
                module.forward = routed.forward


def _with_outer_inputs(named: dict[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder's arguments with token ids, mask and positions of the module around it.

    Only if the embeddings that the decoder got have the shape of the ids: one for each.
    """
    ids, embeddings = outer.get("input_ids"), named.get("inputs_embeds")
    if ids is None or embeddings is None or outer.get("inputs_embeds") is not None:
        return named
    if ids.shape != embeddings.shape[:2]:
        return named
    known = {name: outer.get(name) for name in ("input_ids", "attention_mask")}
    positions = named.get("position_ids")
    return named | known | {"position_ids": outer.get("position_ids") if positions is None else positions}


def carry_state(decoder: nn.Module) -> None:
    """Wrap enabled gradient checkpointing functions so that recomputation runs under the original state."""
    for module in decoder.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, StateCarrier):
            module._gradient_checkpointing_func = StateCarrier(function, module)  # type: ignore[assignment]


class LayerHook:
    """Forward pre-hook of a decoder layer with experts, which computes its gates."""

    def __init__(self, routing: Routing, gates: LayerGates):
        self.routing = routing
        self.gates = gates

    def __call__(self, _layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Store the gates of the layer in the running state, computed in float32 also under autocast."""
        hidden = first_tensor(args, kwargs)
        if torch.is_autocast_enabled(hidden.device.type):
            with torch.autocast(hidden.device.type, enabled=False):
                self._store_gates(hidden, args, kwargs)
        else:
            self._store_gates(hidden, args, kwargs)

    def _store_gates(self, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        """Store the gates of the layer in the running state; by rectangle if gradients are disabled."""
        state = self.routing.running()
        slots = state.slots
        if slots.gates is None:
            self.routing.find_slot_gates(state, hidden, find_cache([*args, *kwargs.values()]))
        assert slots.gates is not None
        if torch.is_grad_enabled():
            state.gates[self.gates], use = self.gates.with_use(hidden, slots.gates)
            collected = self.routing.settings.expert_use
            if use is not None and collected is not None:
                collected.append(use)
            return
        assert slots.by_position is not None
        flat = hidden.reshape(-1, hidden.shape[-1])
        state.gates[self.gates] = self._open_gates(flat, slots.by_position, slots.parts)

    def _open_gates(
        self,
        hidden: Float[Tensor, "positions width"],
        slot_gate: Float[Tensor, "positions slots"],
        parts: Sequence[Part],
    ) -> tuple[OpenGates, ...]:
        found, is_whole = [], len(parts) == 1
        for start, stop, runs in parts:
            if is_whole:
                gates = self.gates(hidden, slot_gate, runs)
            else:
                gates = self.gates(hidden[start:stop], slot_gate[start:stop], runs)
            if runs is None:
                found.append(OpenGates(start, stop, is_whole, None, gates))
            else:
                widths = self.gates.ranks(runs)
                found += [
                    OpenGates(start, stop, is_whole, run, part)
                    for run, part in zip(runs, gates.split(widths, dim=1), strict=True)
                ]
        return tuple(found)


def routing_of(model: PreTrainedModel) -> Routing:
    """Return the routing of a composed model.

    Raises:
        InputError: If the model is not composed.
    """
    routing = getattr(model, "routing", None)
    if not isinstance(routing, Routing):
        raise InputError("This model is not composed: it has no experts attached.")
    return routing


@contextmanager
def fixed_slots(model: PreTrainedModel, weights: Mapping[str, float]) -> Iterator[None]:
    """Use constant slot gates inside the block, for example those of an oracle; slots not named get 0.

    The setting applies to forward passes of the thread or asyncio task that opened it.

    Raises:
        InputError: If the composition has no slot of a given name, or its experts are merged.
    """
    routing = routing_of(model)
    if getattr(model, "merged", None) is not None:
        raise InputError("The slots of a merged composition are fixed.", fix="call unmerge_experts first")
    for name in weights:
        if name not in routing.stack.names:
            raise InputError(f"There is no slot {name!r}.", fix=f"choose among: {', '.join(routing.stack.names)}")
    fixed = torch.tensor([float(weights.get(name, 0.0)) for name in routing.stack.names])
    with changed_settings(routing, fixed=fixed):
        yield


@contextmanager
def recording_routes(model: PreTrainedModel) -> Iterator[list[Route]]:
    """Record the slot gates of every forward pass that this thread or asyncio task runs inside the block.

    A merged composition is not routed and records nothing.
    """
    routes: list[Route] = []
    with changed_settings(routing_of(model), routes=routes):
        yield routes


@contextmanager
def recording_expert_use(model: PreTrainedModel) -> Iterator[list[Float[Tensor, "batch seq new"]]]:
    """Record the expert gates of the trainable bank, one tensor for each layer of every training forward pass."""
    use: list[Tensor] = []
    with changed_settings(routing_of(model), expert_use=use):
        yield use
