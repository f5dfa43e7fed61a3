"""Any-SSR and LORAUTER over PEFT adapters: a router reads the prompt once and mixes the adapters' updates by row."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import peft
import torch
from method import Bench
from peer_routers import ANALYTIC_LAYER, AnalyticRouter, NearestTasks, embedder, mean_hidden
from peft_adapters import Adapter
from streams import Domain
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lorary.domains.data.blocks import encode

Shares = Callable[[Sequence[list[int]]], Tensor]  # token ids of prompts to (prompts, adapters)

TASK_ROWS = 100  # that embed a task
SHORTEST = 2  # tokens of a prompt; of text without one, the whole window is read, which favours these methods


class SharesLayer(DynamicLayer):
    """Each sequence's shares in the key-value cache, so that they are selected and reordered with its keys."""


class RoutedAdapters(nn.Module):
    """The base with a mixture of adapters that is constant over a sequence."""

    def __init__(self, model: Any, names: Sequence[str], shares: Shares):
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.shares = shares
        self._now: Tensor | None = None
        self._lengths: Sequence[int] | None = None
        model.base_model.disable_adapter_layers()  # the hooks add the updates
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.register_forward_hook(self._add_updates)

    @contextmanager
    def reading_prompts(self, lengths: Sequence[int]) -> Iterator[None]:
        """Route by the first tokens of each row inside the block."""
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
    ) -> Any:
        """Route the prompts, or continue with the shares in the cache."""
        layers = past_key_values.layers if past_key_values is not None else []
        kept = next((layer for layer in layers if isinstance(layer, SharesLayer)), None)
        if kept is not None:
            assert kept.keys is not None
            self._now = kept.keys[:, 0, 0]
        else:
            self._now = self._route(input_ids, attention_mask)
        cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.model.config)
        try:
            output = self.model(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=cache is not None
            )
        finally:
            now, self._now = self._now, None
        if cache is not None and kept is None:
            layer = SharesLayer()
            layer.update(now[:, None, None], now[:, None, None])
            cache.layers.append(layer)
        return output

    def _route(self, ids: Tensor, mask: Tensor) -> Tensor:
        real = mask.sum(1).tolist()
        lengths = self._lengths or real
        ends = [length if length >= SHORTEST else whole for length, whole in zip(lengths, real, strict=True)]
        return self.shares([row[:end].tolist() for row, end in zip(ids, ends, strict=True)])

    def _add_updates(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self._now is not None
        for i, name in enumerate(self.names):
            share = self._now[:, i, None, None]
            if share.any():
                update = module.lora_B[name](module.lora_A[name](args[0]))
                output = output + share * module.scaling[name] * update
        return output


def analytic_model(bench: Bench, domains: Sequence[Domain], adapters: Sequence[Adapter]) -> nn.Module:
    """Return Any-SSR over these adapters."""
    prompts, owners = _training_prompts(bench, domains, None)
    router = AnalyticRouter.fit(mean_hidden(bench.base, prompts, ANALYTIC_LAYER), owners, seed=bench.recipe.seed)
    return _over(bench, adapters, lambda ids: router.shares(mean_hidden(bench.base, ids, ANALYTIC_LAYER)))


def nearest_model(bench: Bench, domains: Sequence[Domain], adapters: Sequence[Adapter]) -> nn.Module:
    """Return LORAUTER over these adapters."""
    embed = embedder(bench.base, bench.encoder)
    prompts, owners = _training_prompts(bench, domains, TASK_ROWS)
    router = NearestTasks.fit(embed(prompts), owners)
    return _over(bench, adapters, lambda ids: router.shares(embed(ids)))


def _over(bench: Bench, adapters: Sequence[Adapter], shares: Shares) -> nn.Module:
    model: Any = None
    for adapter in adapters:
        if model is None:
            load = partial(peft.PeftModel.from_pretrained, bench.fresh_base())
            model = load(str(adapter.folder), adapter_name=adapter.id)
        else:
            model.load_adapter(str(adapter.folder), adapter_name=adapter.id)
    return RoutedAdapters(model, [adapter.id for adapter in adapters], shares).eval()


def _training_prompts(bench: Bench, domains: Sequence[Domain], most: int | None) -> tuple[list[list[int]], Tensor]:
    """Return prompts of the training rows, of plain text the first block, and the index of each one's domain."""
    prompts, owners = [], []
    for i, domain in enumerate(domains):
        examples = domain.training_examples()
        step = max(1, len(examples) // most) if most else 1
        for example in examples[::step][:most]:
            ids, is_target = encode(example, bench.base.tokenizer)
            prompts.append((ids[: is_target.index(True)] if example.prompt else ids)[: bench.recipe.block])
            owners.append(i)
    return prompts, torch.tensor(owners)
