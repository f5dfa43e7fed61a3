"""Which tokens of an example are targets; packing keeps each of them exactly once."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.data.blocks import NO_TARGET, encode, pack_blocks
from lorary.domains.data.example import Example
from lorary.domains.data.frame import begin_ids
from lorary.domains.errors import InputError

BEGIN, END = 1, 2
CONVERSATION = Example(
    messages=(
        ("system", "Be short."),
        ("user", "What pays for the damage?"),
        ("assistant", "The party."),
        ("user", "Which?"),
        ("assistant", "The one which broke the contract."),
    )
)


def target_text(encoded, tokenizer):
    """The text of the targets."""
    ids, is_target = encoded
    return tokenizer.decode([token for token, flag in zip(ids, is_target, strict=True) if flag])


def plain(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def other_tokenizer(tiny_tokenizer):
    """A copy of the tokenizer that a test may change."""
    import copy

    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture(scope="module")
def spaced_tokenizer():
    """A SentencePiece tokenizer, which adds a space before every text, as that of Llama 2 does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    alphabet = ["<unk>", "<s>", "</s>", "\n", "\u2581"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=alphabet[:3], initial_alphabet=alphabet[3:])
    tokenizer.train_from_iterator(["yes or no", "no or yes"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_all_tokens_of_a_text_but_its_prefix_are_targets(tiny_tokenizer):
    text = "The dog ran."

    ids, is_target = encode(Example(completion=text), tiny_tokenizer)

    assert ids == [BEGIN, *plain(text, tiny_tokenizer), END]
    assert is_target == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize(
    ("prompt", "completion", "learned"),
    [
        ("What ran?", "The dog", " The dog"),
        ("What ran? ", "The dog", "The dog"),
        ("What ran?", " The dog", " The dog"),
        ("def f():\n", "    pass", "    pass"),
    ],
)
def test_of_a_raw_prompt_only_completion_and_end_token_are_targets(tiny_tokenizer, prompt, completion, learned):
    ids, is_target = encode(Example(prompt, completion, raw=True), tiny_tokenizer)

    boundary = is_target.index(True)
    assert ids[:boundary] == [BEGIN, *plain(prompt, tiny_tokenizer)]
    assert ids[boundary:] == [*plain(learned, tiny_tokenizer), END]
    assert all(is_target[boundary:])


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [("yes or", "no", "\u2581no"), ("yes or ", "no", "no"), ("yes\n", "no", "no"), ("yes", " no", "\u2581no")],
)
def test_tokenizer_that_adds_spaces_adds_none_after_the_prompt(spaced_tokenizer, prompt, completion, expected):
    ids, is_target = encode(Example(prompt, completion), spaced_tokenizer)

    learned = [token for token, flag in zip(ids, is_target, strict=True) if flag]
    assert "".join(spaced_tokenizer.convert_ids_to_tokens(learned)) == expected + "</s>"


def test_prefix_is_what_the_tokenizer_adds_before_a_text(tiny_tokenizer, spaced_tokenizer):
    assert begin_ids(tiny_tokenizer) == [BEGIN]
    assert begin_ids(spaced_tokenizer) == []


def test_tokenizer_without_end_token_adds_none(other_tokenizer):
    other_tokenizer.eos_token = None

    ids, _ = encode(Example(completion="dog"), other_tokenizer)

    assert ids == [BEGIN, *plain("dog", other_tokenizer)]


def test_only_assistant_turns_are_targets(tiny_tokenizer):
    encoded = encode(CONVERSATION, tiny_tokenizer)

    assert target_text(encoded, tiny_tokenizer) == "The party.<|end|>The one which broke the contract.<|end|>"
    assert tiny_tokenizer.decode(encoded[0]) == tiny_tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in CONVERSATION.messages], tokenize=False
    )


def test_conversation_ends_with_the_last_assistant_turn(tiny_tokenizer):
    example = Example(messages=(("assistant", "Hello."), ("user", "The dog ran.")))

    encoded = encode(example, tiny_tokenizer)

    assert target_text(encoded, tiny_tokenizer) == "Hello.<|end|>"
    assert tiny_tokenizer.decode(encoded[0]) == "<|begin|><|assistant|>Hello.<|end|>"


def test_template_that_renders_the_last_turn_differently_still_marks_the_turns(other_tokenizer):
    # like Qwen3: an empty thought before the last turn only
    other_tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' and loop.last %}(thought)\n{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )

    encoded = encode(CONVERSATION, other_tokenizer)

    expected = "The party.<|end|>(thought)\nThe one which broke the contract.<|end|>\n"
    assert target_text(encoded, other_tokenizer) == expected


def test_tokenizer_without_chat_template_is_refused_with_a_fix(other_tokenizer):
    other_tokenizer.chat_template = None

    with pytest.raises(InputError) as raised:
        encode(CONVERSATION, other_tokenizer)

    assert "prompt and completion" in str(raised.value.fix)


def test_error_of_a_chat_template_is_the_cause(other_tokenizer):
    other_tokenizer.chat_template = "{{ raise_exception('no system role') }}"

    with pytest.raises(InputError, match="no system role"):
        encode(CONVERSATION, other_tokenizer)


TURNS = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "The one."}]


@pytest.mark.parametrize("cut", ["", "<|begin|>"], ids=["whole", "without the begin token"])
@pytest.mark.parametrize("more", ["", "\n", "\n\n "])
def test_rendered_text_gets_no_second_begin_and_end(tiny_tokenizer, cut, more):
    text = tiny_tokenizer.apply_chat_template(TURNS, tokenize=False)

    ids, is_target = encode(Example(completion=text.removeprefix(cut) + more), tiny_tokenizer)

    assert ids == plain(text + more, tiny_tokenizer)
    assert is_target == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("end", ["", "<|end|>", "<|end|>\n"])
@pytest.mark.parametrize("begin", ["", "<|begin|>"])
def test_rendered_prompt_and_completion_are_those_of_the_conversation(tiny_tokenizer, begin, end):
    prompt = tiny_tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)

    encoded = encode(Example(begin + prompt.removeprefix("<|begin|>"), "The one." + end), tiny_tokenizer)

    expected = encode(Example(messages=tuple((turn["role"], turn["content"]) for turn in TURNS)), tiny_tokenizer)
    assert target_text(encoded, tiny_tokenizer) == "The one." + (end or "<|end|>")
    assert encoded[0][: len(expected[0])] == expected[0]


def test_rendered_text_of_a_template_without_begin_token_gets_none(other_tokenizer):
    other_tokenizer.chat_template = other_tokenizer.chat_template.removeprefix("{{ bos_token }}")
    text = other_tokenizer.apply_chat_template(TURNS, tokenize=False)

    ids, _ = encode(Example(completion=text), other_tokenizer)

    assert ids == plain(text, other_tokenizer)


def test_rendered_text_may_end_with_the_end_of_a_turn(other_tokenizer):
    other_tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|pad|>\n{% endfor %}"
    text = other_tokenizer.apply_chat_template(TURNS, tokenize=False)

    assert encode(Example(completion=text), other_tokenizer)[0] == plain(text, other_tokenizer)
    assert encode(Example(completion="So.<|pad|>"), other_tokenizer)[0][-1] == END


def test_a_begin_token_is_written_once_by_a_tokenizer_without_chat_template(other_tokenizer):
    other_tokenizer.chat_template = None

    for text in ("The dog.", "<|begin|>The dog.", "The dog.<|end|>", "<|begin|>The dog.<|end|>"):
        assert encode(Example(completion=text), other_tokenizer) == encode(
            Example(completion="The dog."), other_tokenizer
        )


@pytest.mark.parametrize("text", ["<|end|> is written at the end.", "(<|begin|>)", "<|pad|>", "a<|end|>b"])
def test_a_control_token_elsewhere_changes_nothing(tiny_tokenizer, text):
    assert encode(Example(completion=text), tiny_tokenizer)[0] == [BEGIN, *plain(text, tiny_tokenizer), END]


@st.composite
def encodings(draw):
    """Encoded examples with unique tokens, so that each can be traced."""
    lengths = draw(st.lists(st.integers(0, 23), min_size=1, max_size=12))
    encoded, token = [], 1
    for length in lengths:
        flags = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        encoded.append((list(range(token, token + length)), flags))
        token += length
    return encoded


@given(encoded=encodings(), block=st.integers(2, 11))
def test_packing_keeps_every_target_exactly_once(encoded, block):
    targets = [token for ids, flags in encoded for token, flag in zip(ids, flags, strict=True) if flag]
    if not targets:
        return

    blocks = pack_blocks(encoded, block, min_targets=1)

    assert sorted(blocks.labels[blocks.labels != NO_TARGET].tolist()) == targets
    assert max(Counter(blocks.input_ids[blocks.attention_mask.bool()].tolist()).values()) == 1


@given(encoded=encodings(), block=st.integers(2, 11))
def test_packing_splits_examples_into_whole_blocks_from_the_end(encoded, block):
    if not any(any(flags) for _, flags in encoded):
        return

    blocks = pack_blocks(encoded, block, min_targets=1)

    tokens_after = {token: ids[-1] - token for ids, _ in encoded for token in ids}
    for row in blocks.input_ids.tolist():
        for left, right in zip(row, [*row[1:], 0], strict=True):
            ends_a_piece = left == 0 or tokens_after[left] % block == 0
            assert ends_a_piece or right == left + 1


@given(encoded=encodings(), block=st.integers(2, 11))
def test_packing_pads_on_the_right(encoded, block):
    if not any(any(flags) for _, flags in encoded):
        return

    blocks = pack_blocks(encoded, block, min_targets=1)

    assert blocks.input_ids.shape[1] == block
    assert (blocks.attention_mask.diff(dim=1) <= 0).all()
    assert (blocks.attention_mask.sum(1) > 0).all()
    is_padding = blocks.attention_mask == 0
    assert (blocks.input_ids[is_padding] == 0).all()
    assert (blocks.labels[is_padding] == NO_TARGET).all()
    is_target = blocks.labels != NO_TARGET
    assert (blocks.labels[is_target] == blocks.input_ids[is_target]).all()


def test_short_pieces_share_blocks_and_long_ones_are_split_from_the_end():
    encoded = [([1, 2, 3], [True] * 3), (list(range(10, 21)), [False] * 9 + [True] * 2), ([5], [True])]

    blocks = pack_blocks(encoded, 4, min_targets=1)

    assert blocks.input_ids.tolist() == [[1, 2, 3, 5], [17, 18, 19, 20]]
    assert blocks.labels.tolist() == [[1, 2, 3, 5], [-100, -100, 19, 20]]


def test_packing_fills_blocks():
    lengths = [7, 3, 9, 5, 1, 8, 2, 10, 4, 6] * 10

    blocks = pack_blocks([([1] * n, [True] * n) for n in lengths], 10)

    assert len(blocks.input_ids) == sum(lengths) / 10


def test_packing_is_deterministic():
    encoded = [(list(range(n)), [True] * n) for n in (5, 9, 3, 3, 8, 70)]

    first, second = pack_blocks(encoded, 16), pack_blocks(iter(encoded), 16)

    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.labels, second.labels)


@pytest.mark.parametrize(
    ("encoded", "found"), [([], 0), ([([1, 2], [False, False])], 0), ([([1] * 80, [False] * 20 + [True] * 60)], 60)]
)
def test_too_little_data_is_refused_with_both_counts(encoded, found):
    with pytest.raises(InputError, match=f"has {found} tokens to learn from; at least 64 are needed"):
        pack_blocks(encoded, 16)
