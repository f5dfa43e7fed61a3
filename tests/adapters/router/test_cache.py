"""The router's layer of the key-value cache: it follows the sequences through beams, crops and repeats."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from lorary.adapters.router.cache import RouterCacheLayer, StaticRouterLayer, find_cache, router_layer
from lorary.domains.errors import InputError
from lorary.domains.statistics.fading import faded_sums

SUMS = 7


def increments(batch: int = 3, seq: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, seq, SUMS, generator=torch.Generator().manual_seed(seed))


def steps(seq: int = 6, batch: int = 3, seed: int = 0) -> Tensor:
    """How far sums fade at each position: not at all, a little, and so far that little is left."""
    kinds = torch.tensor([0.0, 1 / 32, 0.5, 4.0], dtype=torch.float64)
    return kinds[torch.randint(0, 4, (batch, seq), generator=torch.Generator().manual_seed(seed + 1))]


def faded(seq: int = 6, rows: Any = slice(None)) -> Tensor:
    """The sums at the last of the first positions."""
    return faded_sums(increments()[:, :seq], steps()[:, :seq])[rows, -1]


def tokens(added: Tensor) -> Tensor:
    """Ids of the positions, another for each sequence and position."""
    return torch.arange(added[..., 0].numel()).view(added.shape[:2]) + 100_000


def sums_in(cache: Any, added: Tensor, *, past: int | Tensor, layers: int) -> Tensor:
    layer = router_layer(cache, past=past, layers=layers, sums=added.shape[-1])
    return layer.append(added, tokens(added), steps(added.shape[1], len(added)))


def filled(layer: Any = None) -> Any:
    layer = RouterCacheLayer() if layer is None else layer
    layer.append(increments(), tokens(increments()), steps())
    return layer


def next_sums(layer: Any, step: float = 0.0) -> Tensor:
    """What the layer holds for its last position: the sums after a position that adds nothing."""
    batch = len(layer.keys)
    steps = torch.full((batch, 1), step, dtype=torch.float64)
    return layer.append(torch.zeros(batch, 1, SUMS), torch.zeros(batch, 1).long(), steps)[:, 0]


@pytest.mark.parametrize("chunks", [[6], [1] * 6, [2, 3, 1]])
def test_sums_do_not_depend_on_how_positions_arrive(chunks: list[int]) -> None:
    layer, parts = RouterCacheLayer(), zip(increments().split(chunks, 1), steps().split(chunks, 1), strict=True)

    found = torch.cat([layer.append(part, tokens(part), step) for part, step in parts], dim=1)

    torch.testing.assert_close(found, faded_sums(increments(), steps()))
    assert not torch.allclose(found, increments().cumsum(1), atol=0.1)
    assert layer.get_seq_length() == 6


def test_what_is_held_fades_with_the_next_position() -> None:
    layer = filled()

    torch.testing.assert_close(next_sums(layer, 2.0), faded() / 4)
    torch.testing.assert_close(next_sums(layer, 1.0), faded() / 8)


def test_reordering_moves_the_sums_with_their_sequences() -> None:
    layer = filled()

    layer.reorder_cache(torch.tensor([2, 0, 0]))

    torch.testing.assert_close(next_sums(layer), faded(rows=[2, 0, 0]))


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_cropping_forgets_the_last_positions(kept: int) -> None:
    layer = filled()

    layer.crop(kept - 6)

    assert layer.get_seq_length() == kept
    assert torch.equal(layer.last_tokens(), tokens(increments())[:, kept - 1])
    torch.testing.assert_close(next_sums(layer), faded(kept))


def test_cropped_text_that_is_read_again_has_the_sums_of_before() -> None:
    layer, whole = filled(), faded_sums(increments(), steps())

    layer.crop(-3)
    found = layer.append(increments()[:, 3:], tokens(increments())[:, 3:], steps()[:, 3:])

    torch.testing.assert_close(found, whole[:, 3:])


def test_cropping_everything_starts_from_nothing() -> None:
    layer = filled()

    layer.crop(-6)

    assert layer.get_seq_length() == 0
    found = layer.append(increments(seed=1), tokens(increments()), steps())
    torch.testing.assert_close(found, faded_sums(increments(seed=1), steps()))


def test_repeating_and_selecting_follow_the_batch() -> None:
    layer = filled()

    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3, 5]))

    torch.testing.assert_close(next_sums(layer), faded(rows=[0, 1, 2]))


def test_reset_starts_from_nothing() -> None:
    layer = filled()

    layer.reset()

    assert layer.get_seq_length() == 0
    found = layer.append(increments(batch=1), tokens(increments(batch=1)), steps(batch=1))
    torch.testing.assert_close(found, faded_sums(increments(batch=1), steps(batch=1)))


def test_the_last_token_follows_its_sequence() -> None:
    layer = filled()
    assert RouterCacheLayer().last_tokens() is None

    layer.reorder_cache(torch.tensor([2, 0, 0]))
    layer.crop(-1)

    assert torch.equal(layer.last_tokens(), tokens(increments())[[2, 0, 0], 4])


# --- in a static cache ---


@pytest.mark.parametrize("chunks", [[6], [1] * 6, [2, 3, 1]])
def test_static_sums_do_not_depend_on_how_positions_arrive(chunks: list[int]) -> None:
    layer: Any = StaticRouterLayer()
    assert layer.last_tokens() is None

    ids, found, places = tokens(increments()), [], set()
    parts = [part.split(chunks, dim=1) for part in (increments(), ids, steps())]
    for part, these, step in zip(*parts, strict=True):
        found.append(layer.append(part, these, step))
        places.add(layer.keys.data_ptr())

    torch.testing.assert_close(torch.cat(found, dim=1), faded_sums(increments(), steps()))
    assert layer.get_seq_length() == 6
    assert torch.equal(layer.last_tokens(), ids[:, -1])
    assert len(places) == 1


def test_static_sums_follow_their_sequences_and_start_anew() -> None:
    layer = filled(StaticRouterLayer())

    layer.reorder_cache(torch.tensor([2, 0, 0]))

    assert torch.equal(layer.last_tokens(), tokens(increments())[[2, 0, 0], 5])
    torch.testing.assert_close(next_sums(layer), faded(rows=[2, 0, 0]))

    layer.reset()

    assert torch.equal(layer.last_tokens(), torch.full((3,), -1))
    found = layer.append(increments(seed=1), tokens(increments()), steps())
    torch.testing.assert_close(found, faded_sums(increments(seed=1), steps()))


def test_a_static_cache_has_a_static_layer_and_the_same_refusals() -> None:
    cache: Any = StaticCache(config=LlamaConfig(num_hidden_layers=2), max_cache_len=9)
    sums_in(cache, increments(), past=0, layers=2)

    assert isinstance(cache.layers[-1], StaticRouterLayer)
    assert len(cache.layers) == 3
    assert cache.is_compileable
    with pytest.raises(InputError, match="it holds 5 positions, and routing state for 6"):
        sums_in(cache, increments(seq=1), past=torch.tensor(5), layers=2)
    with pytest.raises(InputError, match="another composition"):
        sums_in(cache, torch.zeros(3, 1, SUMS + 2), past=torch.tensor(6), layers=2)


# --- in the whole cache ---


def test_the_router_layer_comes_after_the_layers_of_the_model() -> None:
    cache = DynamicCache()

    sums_in(cache, increments(), past=0, layers=4)

    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * 4 + ["RouterCacheLayer"]
    assert cache.get_seq_length() == 0


def test_operations_on_the_whole_cache_reach_the_sums() -> None:
    cache: Any = DynamicCache()
    keys = torch.zeros(3, 1, 6, 2)
    cache.update(keys, keys, 0)
    sums_in(cache, increments(), past=0, layers=1)

    cache.reorder_cache(torch.tensor([1, 1, 2]))
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    found = sums_in(cache, torch.zeros(6, 1, SUMS), past=5, layers=1)

    expected = faded(5, rows=[1, 1, 1, 1, 2, 2]) * torch.exp2(-steps(1, 6)).float()
    torch.testing.assert_close(found[:, 0], expected)
    assert cache.is_croppable


@pytest.mark.parametrize("past", [3, 7], ids=["shorter", "longer"])
def test_a_cache_whose_length_differs_from_the_routing_state_is_refused(past: int) -> None:
    cache = DynamicCache()
    sums_in(cache, increments(), past=0, layers=1)

    with pytest.raises(InputError, match=f"it holds {past} positions, and routing state for 6"):
        sums_in(cache, increments(seq=1), past=past, layers=1)


def test_a_cache_of_another_number_of_slots_is_refused() -> None:
    cache = DynamicCache()
    sums_in(cache, increments(), past=0, layers=1)

    with pytest.raises(InputError, match="another composition"):
        sums_in(cache, torch.zeros(3, 1, SUMS + 2), past=6, layers=1)


@pytest.mark.parametrize("arguments", [[], [None, torch.zeros(1), "x"]])
def test_no_cache_is_found_where_there_is_none(arguments: list[Any]) -> None:
    assert find_cache(arguments) is None


def test_the_cache_is_found_among_the_arguments() -> None:
    cache = DynamicCache()

    assert find_cache([None, torch.zeros(1), cache]) is cache
