"""Packed rows, inputs of modules around the decoder, and prompts that arrive in parts."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.forward_state import outer_inputs
from lorary.domains.errors import InputError

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
LENGTHS = (7, 1, 12, 4)
ATTENDING_ACROSS: tuple[str, ...] = ()


@pytest.fixture
def texts(some_ids: Any) -> list[Tensor]:
    return [some_ids(1, length, seed=length) for length in LENGTHS]


def packed(texts: list[Tensor], *, sign: str) -> dict[str, Any]:
    """Return the texts in one row, told apart by one or both signs that collators give."""
    lengths = [text.shape[1] for text in texts]
    found: dict[str, Any] = {"input_ids": torch.cat(texts, 1), "use_cache": False}
    # sdpa needs the position ids in any case
    found["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    if sign == "lengths":
        found["cu_seq_lens_q"] = found["cu_seq_lens_k"] = torch.tensor([0, *lengths]).cumsum(0).int()
    return found


@pytest.mark.own_failure(
    "packed rows whose position ids start again",
    before="the second text off by 4 to 20",
    now="each text as if it were alone",
)
@pytest.mark.parametrize("sign", ["positions", "lengths"])
@pytest.mark.parametrize("is_prompt", [False, True], ids=["causal", "prompts"])
def test_packed_texts_are_computed_as_if_alone(
    any_base: Any, compose: Any, texts: list[Tensor], logits: Any, slot_gates: Any, sign: str, is_prompt: bool
) -> None:
    composed, rows = compose(any_base), packed(texts, sign=sign)

    def run(function: Any, **inputs: Any) -> Tensor:
        if not is_prompt:
            return function(composed, **inputs)
        with composed.reading_prompts():
            return function(composed, **inputs)

    expected = torch.cat([run(slot_gates, input_ids=text, use_cache=False) for text in texts], 1)
    torch.testing.assert_close(run(slot_gates, **rows), expected, **CLOSE)
    if is_separate(any_base, texts, rows, logits):  # else attention, too, goes across texts
        alone = torch.cat([run(logits, input_ids=text, use_cache=False) for text in texts], 1)
        torch.testing.assert_close(run(logits, **rows), alone, **CLOSE)


def test_the_bases_here_separate_packed_texts(any_base: Any, texts: list[Tensor], logits: Any) -> None:
    does = is_separate(any_base, texts, packed(texts, sign="positions"), logits)

    assert does == (any_base.config.model_type not in ATTENDING_ACROSS)


def is_separate(base: Any, texts: list[Tensor], rows: dict[str, Any], logits: Any) -> bool:
    """Return whether the bare base separates packed texts."""
    alone = torch.cat([logits(base, input_ids=text, use_cache=False) for text in texts], 1)
    return torch.allclose(logits(base, **rows), alone, **CLOSE)


def test_packed_prompts_of_given_lengths_are_refused(base: Any, compose: Any, texts: list[Tensor], logits: Any) -> None:
    composed = compose(base)

    with composed.reading_prompts(5), pytest.raises(InputError, match="cannot be packed"):
        logits(composed, **packed(texts, sign="positions"))


# --- prompts in parts ---


@pytest.mark.own_failure(
    "a prompt read as a whole that arrives in chunks",
    before="the first chunk alone was read as a whole: off by 1.3",
    now="read at once by `generate`, with a warning; parts in forward passes are refused, exit 2",
)
@pytest.mark.parametrize("chunk", [1, 3, 4, 11])
@pytest.mark.parametrize("length", [None, 12])
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_a_prompt_in_chunks_is_read_at_once_where_it_is_read_as_a_whole(
    base: Any, compose: Any, some_ids: Any, generated: Any, chunk: int, length: int | None, how: dict[str, Any]
) -> None:
    composed, ids = compose(base), some_ids(2, 12)
    causal = generated(composed, input_ids=ids)

    with composed.reading_prompts(length):
        expected = generated(composed, input_ids=ids)
        with pytest.warns(UserWarning, match="prefill_chunk_size=.* is ignored"):
            assert torch.equal(generated(composed, input_ids=ids, prefill_chunk_size=chunk, **how), expected)

    assert torch.equal(generated(composed, input_ids=ids, prefill_chunk_size=chunk, **how), causal)


def test_a_chunk_size_of_the_models_config_counts(base: Any, compose: Any, some_ids: Any, generated: Any) -> None:
    composed, ids = compose(base), some_ids(1, 12)
    with composed.reading_prompts():
        expected = generated(composed, input_ids=ids)
        composed.generation_config.prefill_chunk_size = 5
        with pytest.warns(UserWarning, match="prefill_chunk_size=5 is ignored"):
            assert torch.equal(generated(composed, input_ids=ids), expected)


@pytest.mark.own_failure(
    "continuous batching of transformers 5 (`generate_batch`)", before="empty answers", now="refused, exit 2"
)
def test_continuous_batching_is_refused_at_the_call(base: Any, compose: Any, some_ids: Any) -> None:
    composed, ids = compose(base), some_ids(1, 5)

    with pytest.raises(InputError, match="continuous batching"):
        composed.generate_batch(inputs=ids.tolist())
    with pytest.raises(InputError, match="continuous batching"):
        composed.init_continuous_batching()
    with pytest.raises(InputError, match="continuous batching"):
        composed.generate(ids, cache_implementation="paged")
    with pytest.raises(InputError, match="continuous batching"):
        composed(input_ids=ids, write_index=[torch.arange(5)])


def test_the_rest_of_a_prompt_is_refused_too(base: Any, compose: Any, some_ids: Any) -> None:
    composed, ids = compose(base), some_ids(1, 12)
    with torch.no_grad():
        cache = composed(input_ids=ids[:, :8], use_cache=True).past_key_values
        with composed.reading_prompts(12), pytest.raises(InputError, match="reads 4 after 8"):
            composed(input_ids=ids[:, 8:], past_key_values=cache)
        with composed.reading_prompts(8):
            composed(input_ids=ids[:, 8:], past_key_values=cache)


# --- a decoder that is called with embeddings by the module around it ---


@pytest.fixture(scope="module")
def wrapped() -> Any:
    """A vision-language model with a tiny Gemma 3 as its text decoder."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    tokens = {"image_token_index": 63, "boi_token_index": 62, "eoi_token_index": 61, "pad_token_id": 0}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.own_failure(
    "text on a vision-language base",
    before="refused with advice that could not be followed",
    now="routed by the ids that the outer model gets",
)
def test_the_ids_of_a_model_around_the_decoder_are_routed(
    wrapped: Any, compose: Any, prompts: Any, padded: Any, logits: Any, slot_gates: Any
) -> None:
    composed = compose(wrapped)
    texts = [text.clamp(max=60) for text in prompts()]
    batch = padded(texts, left=True)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    alone = [slot_gates(composed, input_ids=text) for text in texts]

    found, answers = slot_gates(composed, **batch), logits(composed, **batch, position_ids=positions)

    for row, text in enumerate(texts):
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(found[row, real], alone[row][0], **CLOSE)
        torch.testing.assert_close(answers[row, real], logits(composed, input_ids=text)[0], **CLOSE)
    assert not torch.allclose(alone[0][0, -1], alone[1][0, -1])
    assert not outer_inputs(composed.routing)


def test_it_generates_as_it_computes_without_a_cache(wrapped: Any, compose: Any, some_ids: Any, generated: Any) -> None:
    composed, ids = compose(wrapped), some_ids(2, 9).clamp(max=60)

    found = [generated(composed, input_ids=ids, use_cache=use_cache) for use_cache in (True, False)]

    assert torch.equal(*found)


def test_embeddings_of_the_caller_are_refused(wrapped: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed, ids = compose(wrapped), some_ids(1, 9).clamp(max=60)
    embeddings = composed.get_input_embeddings()(ids)

    with pytest.raises(InputError, match="routes by its input tokens"):
        logits(composed, inputs_embeds=embeddings)
    with pytest.raises(InputError, match="routes by its input tokens"):
        logits(composed.model.language_model, inputs_embeds=embeddings)


# --- gradient checkpointing ---


@pytest.mark.own_failure(
    "two forward passes before one backward pass, with gradient checkpointing",
    before="gradients off by 33 %",
    now="those of one after the other",
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # renamed in 5.23
@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_before_one_backward_have_the_gradients_of_one_after_the_other(
    base: Any, random_stack: Any, random_router: Any, some_ids: Any, reentrant: bool
) -> None:
    texts = [some_ids(2, 9, seed=1), some_ids(1, 6, seed=2), some_ids(2, 9, seed=3)]

    def gradients(*, together: bool, is_checkpointed: bool) -> list[Tensor]:
        stack = random_stack(base, seed=0, trainable=True)
        model = attach(base, stack, router=random_router(base, slots=len(stack.names), seed=0)).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = []
        for ids in texts:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if together:
                losses.append(loss)
            else:
                loss.backward()
        if together:
            torch.stack(losses).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients(together=False, is_checkpointed=False)
    assert expected
    for together in (False, True):
        found = gradients(together=together, is_checkpointed=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
