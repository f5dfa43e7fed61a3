"""Running sums of the domain router, stored as an additional layer of the key-value cache.

As a layer of the cache, the sums are reordered by beam search, cropped by assisted decoding and repeated for several
return sequences exactly as keys and values are, and have the lifetime of their sequence. A static cache, which CUDA
graphs need, gets a layer with fixed memory whose length is never read.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer

from ...domains.errors import InputError
from ...domains.statistics.fading import faded_sums


class RouterCacheLayer(DynamicLayer):
    """Sums up to each position, as `keys` of shape (batch, 1, seq, sums); `values` the last token."""

    router: str | None = None  # identity of the router that they are of

    def last_tokens(self) -> Int64[Tensor, " batch"] | None:
        """Return the last text token of each sequence, -1 if there is none yet; None before the first position."""
        if not self.get_seq_length() or self.values is None:
            return None
        return self.values[:, 0, -1, 0].long()

    def append(
        self,
        increments: Float[Tensor, "batch seq sums"],
        tokens: Int64[Tensor, "batch seq"],
        steps: Float[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq sums"]:
        """Append new positions, with the last text token at each, and return the sums up to each of them."""
        before = self.keys[:, 0, -1] if self.get_seq_length() and self.keys is not None else None
        sums = faded_sums(increments, steps, before)
        # caches cast keys and values to one dtype; that of the sums represents every id exactly
        self.update(sums.unsqueeze(1), tokens.to(sums.dtype)[:, None, :, None])
        return sums


class StaticRouterLayer(StaticLayer):
    """Latest sums in a static cache, as `keys` of shape (batch, 1, 1, sums); `values` the last token.

    Nothing is read back from the device: before the first position the sums are zero and the last token is -1. A static
    cache is never cropped, so earlier sums are not needed.
    """

    keys: Tensor
    values: Tensor
    router: str | None = None

    def __init__(self) -> None:
        super().__init__(max_cache_len=1)

    def last_tokens(self) -> Int64[Tensor, " batch"] | None:
        """Return the last text token of each sequence, -1 if there is none yet; None before the first position."""
        if not self.is_initialized:
            return None
        return torch.where(self.cumulative_length > 0, self.values[:, 0, 0, 0].long(), -1)

    def append(
        self,
        increments: Float[Tensor, "batch seq sums"],
        tokens: Int64[Tensor, "batch seq"],
        steps: Float[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq sums"]:
        """Append new positions, with the last text token at each, and return the sums up to each of them."""
        last = tokens[:, -1:].to(increments.dtype)[:, None, :, None]
        if not self.is_initialized:
            self.lazy_initialization(increments[:, None, -1:], last)
        sums = faded_sums(increments, steps, self.keys[:, 0, 0])
        self.keys.copy_(sums[:, None, -1:])
        self.values.copy_(last)
        self.cumulative_length.add_(increments.shape[1])
        return sums


RouterLayer = RouterCacheLayer | StaticRouterLayer


def router_layer(cache: Cache, *, past: int | Tensor, layers: int, sums: int, router: str | None = None) -> RouterLayer:
    """Return the router's layer of a cache, adding it if there is none yet.

    Args:
        cache: The key-value cache of this forward pass.
        past: Positions in the cache when the forward pass began (layers before this one have added theirs since); a
            tensor for a static cache.
        layers: Number of decoder layers of the model; the router's layer comes after theirs.
        sums: Number of sums that the router keeps.
        router: Its identity; None if any will do.

    Raises:
        InputError: If the cache was filled by another model or composition.
    """
    layer = next((one for one in cache.layers if isinstance(one, RouterLayer)), None)
    held = 0 if layer is None else layer.get_seq_length()
    # reading a tensor synchronizes a GPU and breaks a graph: checked at most once for each cache
    is_far = isinstance(past, Tensor) and (torch.compiler.is_compiling() or (past.is_cuda and layer is not None))
    if not is_far and held != past:
        raise InputError(
            "The key-value cache was filled by another model.",
            cause=f"it holds {int(past)} positions, and routing state for {int(held)}",
            fix="start with an empty cache, or omit past_key_values",
        )
    if layer is None:
        # lazily filled caches need their own layers first, to keep layer indices right
        while cache.layer_class_to_replicate is not None and len(cache.layers) < layers:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = StaticRouterLayer() if cache.is_compileable else RouterCacheLayer()
        cache.layers.append(layer)
    if layer.is_initialized and layer.keys is not None and layer.keys.numel() and layer.keys.shape[-1] != sums:
        raise _other_composition()
    layer.router = router
    return layer


def check_cache(cache: Cache, router: str | None) -> None:
    """Raise an error if a cache was filled by another composition; called before anything is computed.

    Args:
        cache: The key-value cache of a forward pass.
        router: Identity of the composition's router; None if it has none.

    Raises:
        InputError: It was.
    """
    layer = next((one for one in cache.layers if isinstance(one, RouterLayer)), None)
    if layer is not None and layer.router != router and int(layer.get_seq_length()):  # not after a reset
        raise _other_composition()


def _other_composition() -> InputError:
    return InputError(
        "The key-value cache was filled by another composition.",
        cause="keys and values of its text were computed with other experts or another prior",
        fix="start with an empty cache, or omit past_key_values",
    )


def positions_in(cache: Cache) -> int | Tensor:
    """Return the number of positions in a cache; in one of state-space layers alone, that of the router's layer.

    Raises:
        InputError: If the cache holds state of a model without a router, which does not count positions.
    """
    if not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return cache.get_seq_length()
    states = (layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin))
    if any(value for layer in states for value in layer.has_previous_state.values()):
        raise InputError(
            "The key-value cache was filled by another model.",
            cause="it holds state, and no routing state",
            fix="start with an empty cache, or omit past_key_values",
        )
    return 0


def seen_by_themselves(
    mask: Shaped[Tensor, "batch 1 seq cache"], seq: int, past: int | Tensor
) -> Bool[Tensor, "batch seq"]:
    """Return True for new positions that attend to themselves in `generate`'s mask for a static cache: all but padding.

    Args:
        mask: True, or 0 in an additive mask, where a position is attended to.
        seq: Number of new positions.
        past: Number of positions before them.
    """
    columns = (torch.arange(seq, device=mask.device) + past).view(1, seq, 1).expand(len(mask), seq, 1)
    found = mask[:, 0].gather(2, columns).squeeze(2)
    return found if found.dtype == torch.bool else found == 0


def find_cache(arguments: Any) -> Cache | None:
    """Return the key-value cache among a module's arguments, or None."""
    return next((value for value in arguments if isinstance(value, Cache)), None)
