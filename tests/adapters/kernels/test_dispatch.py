"""Choice of the implementation, and agreement of whole models across implementations."""

from typing import Any

import pytest
import torch

from lorary.adapters.kernels import dispatch, eager, reference
from lorary.adapters.kernels.dispatch import choose_kernels, use_kernels
from lorary.domains.errors import InputError

CPU = torch.device("cpu")


def test_a_cpu_uses_eager_unless_another_is_selected() -> None:
    assert choose_kernels(CPU) is eager

    with use_kernels("reference"):
        assert choose_kernels(CPU) is reference
        with use_kernels("eager"):
            assert choose_kernels(CPU) is eager
        assert choose_kernels(CPU) is reference

    assert choose_kernels(CPU) is eager


def test_the_selection_ends_if_the_context_raises() -> None:
    with pytest.raises(KeyError), use_kernels("reference"):
        raise KeyError

    assert choose_kernels(CPU) is eager


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(InputError, match="'fast'"), use_kernels("fast"):
        pass


def test_a_gpu_uses_triton_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert choose_kernels(torch.device("cuda")) is eager
    with pytest.raises(InputError, match="not installed"), use_kernels("triton"):
        pass

    monkeypatch.undo()
    if dispatch.has_triton():
        assert choose_kernels(torch.device("cuda")).__name__.endswith("triton_group")


def test_logits_match_on_triton(base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    pytest.importorskip("triton")
    composed = compose(base)
    expected = logits(composed, input_ids=some_ids(2, 5))

    with use_kernels("triton"):
        found = logits(composed, input_ids=some_ids(2, 5))

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generated_tokens_match_on_triton_with_either_cache(
    base: Any, compose: Any, some_ids: Any, generated: Any
) -> None:
    pytest.importorskip("triton")
    composed, inputs = compose(base), {"input_ids": some_ids(1, 20), "max_new_tokens": 3}
    expected = generated(composed, **inputs)

    with use_kernels("triton"):
        found = generated(composed, **inputs)
        with_static_cache = generated(composed, **inputs, cache_implementation="static")

    assert torch.equal(found, expected)
    assert torch.equal(with_static_cache, expected)


def test_gradients_match_on_triton(base: Any, compose: Any, some_ids: Any) -> None:
    pytest.importorskip("triton")

    def gradients(name: str) -> dict[str, Any]:
        model = compose(base, trainable=True, first_layer=3).train()
        with use_kernels(name):
            model(input_ids=some_ids(1, 5), labels=some_ids(1, 5)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    found, expected = gradients("triton"), gradients("reference")

    assert found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_logits_match_on_the_reference(any_base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed = compose(any_base)
    expected = logits(composed, input_ids=some_ids(2))

    with use_kernels("reference"):
        found = logits(composed, input_ids=some_ids(2))

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
