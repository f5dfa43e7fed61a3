"""Example: one row of a corpus, whatever form it had on disk."""

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One row of a corpus: a text, a prompt with its completion, or a conversation.

    A text has an empty prompt and is the completion. A conversation has messages and neither prompt nor completion.
    """

    prompt: str = ""
    completion: str = ""
    choices: tuple[str, ...] = ()  # the completion is one of them
    id: str = ""  # a label, no part of the content
    messages: tuple[tuple[str, str], ...] = ()  # (role, content) with role system, user or assistant

    @property
    def text(self) -> str:
        """All of it as one text: prompt and completion, or the contents of the messages, one per line."""
        if self.messages:
            return "\n".join(content for _, content in self.messages)
        return self.prompt + self.continuation

    @property
    def continuation(self) -> str:
        """The completion as it follows the prompt: one space is put between them if neither has white space there."""
        joined = not self.prompt or self.prompt[-1].isspace() or self.completion[:1].isspace()
        return self.completion if joined else " " + self.completion

    @property
    def target_bytes(self) -> int:
        """UTF-8 bytes of what is to be learned: the completion, or what the assistant says."""
        if self.messages:
            return sum(len(content.encode()) for role, content in self.messages if role == "assistant")
        return len(self.completion.encode())

    def digest(self) -> bytes:
        """SHA-256 of the content: everything but the id."""
        content = [self.prompt, self.completion, list(self.choices), [list(message) for message in self.messages]]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).digest()
