"""Find the tokens that belong around a text: begin, end, and what the chat template writes."""

from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from .chat import TEMPLATE_ERRORS

_CONTENT: Final = "Qx0xQ"  # stands in a turn that shows what the template writes before it


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer adds before a text: usually its begin token, or none."""
    whole, plain = tokenizer("a")["input_ids"], text_ids("a", tokenizer)
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end token, or an empty list if the tokenizer has none."""
    token: Any = tokenizer.eos_token_id
    return [] if token is None else [token]


@dataclass(frozen=True)
class Frame:
    """The tokens around a text."""

    bos: list[int]  # before it
    ends: set[int]  # any of them ends it
    control: frozenset[int] = frozenset()  # special tokens of the chat template, if it rendered the text
    is_rendered: bool = False  # by the chat template: the text begins as one of its renderings does


def frame_of(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Return what belongs around a text: for one that the chat template rendered, what the template writes."""
    bos, ends = begin_ids(tokenizer), set(end_ids(tokenizer))
    special = set()
    if not text[:1].isalnum():
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    if not ids or ids[0] not in special:
        return Frame(bos, ends, is_rendered=_begins_a_turn(text, tokenizer))
    rendered = _rendered_ids(tokenizer)
    control = frozenset(token for turns in rendered for token in turns if token in special)
    begin: Any = tokenizer.bos_token_id
    if ids[0] == begin and ids[: len(bos)] != bos:
        bos = [begin]
    elif ids[0] != begin and ids[0] not in control:
        return Frame(bos, ends)
    elif ids[0] != begin and any(turns[: len(bos)] != bos for turns in rendered):
        bos = []
    return Frame(bos, ends | {turns[-1] for turns in rendered if turns[-1] in special}, control, is_rendered=True)


def _rendered_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of small conversations as the chat template renders them, without white space at the end."""
    talk = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    found = []
    for turns in (talk, talk[1:]) if tokenizer.chat_template else ():
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except TEMPLATE_ERRORS:  # many know no system message
            continue
        found.append(text_ids(text.rstrip(), tokenizer))
    return found


def _begins_a_turn(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a text begins with what the template writes before a user's turn, as `[INST]`: not a word."""
    if not tokenizer.chat_template or not text or text[0].isalnum() or text[0].isspace():
        return False
    try:
        turn = str(tokenizer.apply_chat_template([{"role": "user", "content": _CONTENT}], tokenize=False))
    except TEMPLATE_ERRORS:
        return False
    header = turn.partition(_CONTENT)[0].removeprefix(str(tokenizer.bos_token or "")).strip()
    return bool(header) and text.startswith(header)


def ends_text(ids: list[int], ends: set[Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether an end token is the last but for white space."""
    for token in reversed(ids):
        if token in ends or str(tokenizer.decode([token])).strip():
            return token in ends
    return False


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text without any around it."""
    # not verbose: texts longer than the context window are split later, without a warning
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def following_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text that follows another one.

    SentencePiece tokenizers add a space before a text, but not after a line break: so the text is tokenized after a
    line break, which is then removed.
    """
    ids = text_ids(text, tokenizer)
    if not ids or not str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("\u2581"):
        return ids
    anchor, anchored = text_ids("\n", tokenizer), text_ids("\n" + text, tokenizer)
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else ids
