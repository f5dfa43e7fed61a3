"""Conversation: ask a composed model one question after the other, each with all that was said before.

    conversation = registry.chat(registry.compose("medicine+legal"))
    print(conversation.ask("What is anaemia?").text)
    print(conversation.ask("And how is it treated?").text)

The prompt of a turn is the whole conversation, rendered by the chat template and read at once; nothing is dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ...domains.base_model import max_positions
from ...domains.data.prompt import AS_TEXT, prompt_ids
from ...domains.errors import InputError
from .generate import Answer, GenerationSettings, check_text, generate


@dataclass(frozen=True)
class Turn:
    """A question with its answer."""

    question: str
    answer: Answer


class Conversation:
    """Turns of a user and of a composed model, which may be replaced between two turns.

    Args:
        model: A composed model.
        tokenizer: The tokenizer of its base model.
        settings: How each question is answered; an answer may be shorter where the context ends.
        raw: Continue the text of all turns, one per line, without the tokenizer's chat template.

    Attributes:
        turns: The answered questions. One whose answer is empty is not among them.

    Raises:
        InputError: The tokenizer has no chat template, and `raw` is not set.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        *,
        raw: bool = False,
    ):
        if not raw and not tokenizer.chat_template:
            raise InputError(
                "The base model cannot chat: its tokenizer has no chat template.",
                fix=f"use an instruct version of it; or {AS_TEXT}",
            )
        self.model, self.tokenizer, self.settings, self.raw = model, tokenizer, settings, raw
        self.turns: list[Turn] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said so far, as a chat template takes it."""
        pairs = [(("user", turn.question), ("assistant", turn.answer.text)) for turn in self.turns]
        return [{"role": role, "content": text} for pair in pairs for role, text in pair]

    @property
    def context(self) -> int | None:
        """Tokens that a question, all before it and its answer may have; None if there is no limit."""
        return max_positions(self.model)

    def ask(
        self, question: str, *, streamer: BaseStreamer | None = None, should_stop: Callable[[], bool] | None = None
    ) -> Answer:
        """Answer a question; it becomes a turn of the conversation unless the answer is empty.

        Args:
            question: The user's next message.
            streamer: As for `generate`.
            should_stop: Asked after each token whether to end the answer there.

        Raises:
            InputError: The question is no text, or the conversation has become longer than the context of the base
                model; it stays as it was.
        """
        check_text(question, "The question")
        prompt: Any = [*self.messages, {"role": "user", "content": question}]
        if self.raw:
            prompt = "\n".join([*(text for turn in self.turns for text in (turn.question, turn.answer.text)), question])
        answer = generate(
            self.model,
            self.tokenizer,
            prompt,
            replace(self.settings, max_new_tokens=self._room(prompt)),
            raw=self.raw,
            streamer=streamer,
            should_stop=should_stop,
        )
        if answer.empty_because is None:
            self.turns.append(Turn(question, answer))
        return answer

    def is_full(self, answer: Answer) -> bool:
        """Return whether an answer ended because the context did."""
        return answer.finish == "length" and answer.prompt_tokens + answer.new_tokens == self.context

    def reset(self) -> None:
        """Forget what was said."""
        self.turns.clear()

    def _room(self, prompt: Any) -> int:
        """Return how many tokens the answer may have.

        Raises:
            InputError: There is no room for any.
        """
        if self.context is None:
            return self.settings.max_new_tokens
        length = len(prompt_ids(prompt, self.tokenizer, raw=self.raw))
        if length >= self.context:
            raise InputError(
                "The conversation is longer than the base model's context.",
                cause=f"it has {length} tokens with this question; the context has {self.context}",
                fix="start over: /reset, in Python reset(); or ask a shorter question",
            )
        return min(self.settings.max_new_tokens, self.context - length)
