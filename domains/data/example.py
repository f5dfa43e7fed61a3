"""One row of a corpus, independent of its form on disk."""

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """Text, prompt with completion, or conversation.

    A text is a completion with an empty prompt. A conversation has messages, and neither prompt nor completion.
    """

    prompt: str = ""
    completion: str = ""
    choices: tuple[str, ...] = ()  # include the completion
    id: str = ""  # label; not part of the content
    messages: tuple[tuple[str, str], ...] = ()  # (role, content) with role system, user or assistant

    @property
    def text(self) -> str:
        """Prompt and completion as one text, or the contents of the messages, one per line."""
        if self.messages:
            return "\n".join(content for _, content in self.messages)
        return self.prompt + self.continuation

    @property
    def continuation(self) -> str:
        """Completion, after one space unless the prompt is empty or white space separates them already."""
        joined = not self.prompt or self.prompt[-1].isspace() or self.completion[:1].isspace()
        return self.completion if joined else " " + self.completion

    @property
    def target_bytes(self) -> int:
        """UTF-8 bytes of the target text: the completion, or the assistant's messages."""
        if self.messages:
            return sum(len(content.encode()) for role, content in self.messages if role == "assistant")
        return len(self.completion.encode())

    def digest(self) -> bytes:
        """Return the SHA-256 of the content: all fields but the id."""
        content = [self.prompt, self.completion, list(self.choices), [list(message) for message in self.messages]]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).digest()
