"""The domain router's running sums, kept inside the key-value cache of `generate`.

Being one more layer of the cache, the sums are reordered by beam search, cropped by assisted decoding and repeated for
several return sequences exactly as keys and values are, and they live and die with the sequence they belong to.
A static cache, which graphs need, gets a layer whose memory stays where it is and whose length is never read.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from ...domains.errors import InputError


class RouterCacheLayer(DynamicLayer):
    """Sums up to each position, as `keys` of shape (batch, 1, seq, sums); `values` the last token."""

    def last_tokens(self) -> Int64[Tensor, " batch"] | None:
        """The last token of each sequence's text, -1 where there is none yet; None before the first position."""
        if not self.get_seq_length() or self.values is None:
            return None
        return self.values[:, 0, -1, 0].long()

    def append(
        self, increments: Float[Tensor, "batch seq sums"], tokens: Int64[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq sums"]:
        """Adds new positions, with the last token of the text at each, and returns the sums up to each of them."""
        sums = increments.cumsum(1)
        if self.get_seq_length() and self.keys is not None:
            sums = sums + self.keys[:, 0, -1:]
        # as numbers of the sums' type, in which every id is exact: caches cast both alike
        self.update(sums.unsqueeze(1), tokens.to(sums.dtype)[:, None, :, None])
        return sums


class StaticRouterLayer(StaticLayer):
    """The same in a static cache: only the latest sums, as `keys` of shape (batch, 1, 1, sums), and the last token.

    Nothing is read back: where no position has been seen yet, the sums are zero and the last token is -1. A static
    cache is never cropped, so that earlier sums are not needed.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__(max_cache_len=1)

    def last_tokens(self) -> Int64[Tensor, " batch"] | None:
        """The last token of each sequence's text, -1 where there is none yet; None before the first position."""
        if not self.is_initialized:
            return None
        return torch.where(self.cumulative_length > 0, self.values[:, 0, 0, 0].long(), -1)

    def append(
        self, increments: Float[Tensor, "batch seq sums"], tokens: Int64[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq sums"]:
        """Adds new positions, with the last token of the text at each, and returns the sums up to each of them."""
        last = tokens[:, -1:].to(increments.dtype)[:, None, :, None]
        if not self.is_initialized:
            self.lazy_initialization(increments[:, None, -1:], last)
        sums = increments.cumsum(1) + self.keys[:, 0]
        self.keys.copy_(sums[:, None, -1:])
        self.values.copy_(last)
        self.cumulative_length.add_(increments.shape[1])
        return sums


RouterLayer = RouterCacheLayer | StaticRouterLayer


def router_layer(cache: Cache, *, past: int | Tensor, layers: int, sums: int) -> RouterLayer:
    """The router's layer of a cache, made if it has none yet.

    Args:
        cache: The key-value cache of this forward pass.
        past: Positions that the cache held when the forward pass began; layers without experts have added theirs since.
            A static cache tells them as a tensor.
        layers: Decoder layers of the model; the router's layer comes after theirs.
        sums: How many the router keeps.

    Raises:
        InputError: The cache was filled by another model than this composition.
    """
    layer = next((one for one in cache.layers if isinstance(one, RouterLayer)), None)
    held = 0 if layer is None else layer.get_seq_length()
    # what a GPU or a graph holds cannot be read without waiting for it, which is done once for a cache at most
    is_far = isinstance(past, Tensor) and (torch.compiler.is_compiling() or (past.is_cuda and layer is not None))
    if not is_far and held != past:
        raise InputError(
            "The key-value cache was filled by another model.",
            cause=f"it holds {int(past)} positions, and routing state for {int(held)}",
            fix="start from an empty cache, or let generate() make one",
        )
    if layer is None:
        # lazily filled caches must have their own layers first, so that indices stay right
        while cache.layer_class_to_replicate is not None and len(cache.layers) < layers:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = StaticRouterLayer() if cache.is_compileable else RouterCacheLayer()
        cache.layers.append(layer)
    if layer.is_initialized and layer.keys is not None and layer.keys.numel() and layer.keys.shape[-1] != sums:
        raise InputError("The key-value cache was filled by another composition.")
    return layer


def seen_by_themselves(
    mask: Shaped[Tensor, "batch 1 seq cache"], seq: int, past: int | Tensor
) -> Bool[Tensor, "batch seq"]:
    """Which new positions see themselves in the mask that `generate` makes for a static cache: all but padding.

    Args:
        mask: True, or 0, where a position is seen.
        seq: New positions.
        past: Positions before them.
    """
    columns = (torch.arange(seq, device=mask.device) + past).view(1, seq, 1).expand(len(mask), seq, 1)
    found = mask[:, 0].gather(2, columns).squeeze(2)
    return found if found.dtype == torch.bool else found == 0


def find_cache(arguments: Any) -> Cache | None:
    """The key-value cache among a module's arguments."""
    return next((value for value in arguments if isinstance(value, Cache)), None)
