"""Make the tokens of a prompt: a user's turn of the chat template, or plain text.

One rule for everything that is asked: a prompt is a user's turn if the tokenizer has a chat template, unless the caller
wants the text as it is (`raw`), or the template rendered it already. Rows of prompt and completion, questions,
generation and routing follow it by `is_chat` and `prompt_ids`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .chat import render_prompt
from .example import Example
from .frame import frame_of, text_ids
from .rows import BadRowError, to_question

AS_TEXT: Final = "leave the chat template out: --raw, in Python raw=True"
Message = Mapping[str, Any]  # role, content, and what else the template knows
Prompt = str | Sequence[Message]


def is_chat(prompt: str, tokenizer: PreTrainedTokenizerBase, *, raw: bool = False) -> bool:
    """Return whether a prompt is rendered as a user's turn of the tokenizer's chat template."""
    if raw or not tokenizer.chat_template or not prompt.strip():
        return False
    return not frame_of(prompt, text_ids(prompt, tokenizer), tokenizer).is_rendered


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, raw: bool = False) -> list[int]:
    """Return the tokens of a prompt, after which the answer begins.

    Args:
        prompt: A text, or the messages of a conversation.
        tokenizer: The base model's tokenizer.
        raw: Take the text as it is, with the begin token that the tokenizer adds.

    Raises:
        InputError: Messages cannot be used, the tokenizer has no chat template for them, or the template leaves out a
            part of the prompt.
    """
    if not isinstance(prompt, str):
        return _message_ids(prompt, tokenizer, raw=raw)
    if is_chat(prompt, tokenizer, raw=raw):
        question = Example(messages=(("user", prompt.rstrip()),))
        return text_ids(render_prompt(question, tokenizer, fix=AS_TEXT), tokenizer)
    ids = text_ids(prompt, tokenizer)
    bos = frame_of(prompt, ids, tokenizer).bos
    return ids if ids[: len(bos)] == bos else bos + ids


def _message_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, raw: bool) -> list[int]:
    if raw:
        raise InputError("Messages cannot be read without a chat template.", fix="give a text, or leave out raw")
    try:
        question = to_question(messages)
    except BadRowError as error:
        raise InputError(f"The messages cannot be used: {error}.", fix="give objects with role and content") from error
    return text_ids(render_prompt(question, tokenizer, fix="change the messages, or give a text"), tokenizer)


def as_conversation(example: Example) -> Example:
    """Return a prompt with its completion as a conversation: a user's turn, and the assistant's.

    White space at the end of the prompt only separates the two in plain text; between turns the template does.
    """
    turns = (("user", example.prompt.rstrip()), ("assistant", example.completion))
    return Example(messages=turns, id=example.id, source=example.source, line=example.line)
