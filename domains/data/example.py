"""One row of a corpus, independent of its form on disk."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """Text, prompt with completion, or conversation.

    A text is a completion with an empty prompt. A conversation has messages, and neither prompt nor completion.
    """

    prompt: str = ""
    completion: str = ""
    choices: tuple[str, ...] = ()  # include the completion
    id: str = ""  # label; not part of the content
    messages: tuple[tuple[str, str], ...] = ()  # (role, content) with role system, user, assistant or tool
    # JSON of what a conversation has beside roles and contents, if anything: `tools`; `fields`, one object a message;
    # `untrained`, the indices of assistant messages that are not learned
    more: str = ""
    # prompt and completion are read as they are, though the tokenizer has a chat template; no content of the row
    raw: bool = False
    document: str = field(default="", compare=False, repr=False)  # that the row is a part of; no content of the row
    # name of the kind of text inside its domain, which scores are told apart by; no content of the row
    kind: str | None = field(default=None, compare=False, repr=False)
    source: str = field(default="", compare=False, repr=False)  # file or other source, for errors
    line: int | None = field(default=None, compare=False, repr=False)

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
    def turns(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them, with all fields."""
        fields = self._more.get("fields") or [{}] * len(self.messages)
        pairs = zip(self.messages, fields, strict=True)
        return [{"role": role, "content": content} | more for (role, content), more in pairs]

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The tools that a conversation may call, as JSON schemas."""
        return self._more.get("tools")

    @property
    def learned_turns(self) -> tuple[int, ...]:
        """The indices of the messages that are learned: the assistant's, unless the row excludes them."""
        untrained = self._more.get("untrained", [])
        turns = (i for i, (role, _) in enumerate(self.messages) if role == "assistant")
        return tuple(turn for turn in turns if turn not in untrained)

    @property
    def target_bytes(self) -> int:
        """UTF-8 bytes of the target text: the completion, or the assistant's messages."""
        if not self.messages:
            return len(self.completion.encode())
        turns = self.turns
        return sum(_bytes(value) for i in self.learned_turns for key, value in turns[i].items() if key != "role")

    def digest(self) -> bytes:
        """Return the SHA-256 of the content: all fields but id, raw, document, kind, source and line."""
        content = [self.prompt, self.completion, list(self.choices), [list(message) for message in self.messages]]
        if self.more:  # digests of other rows are older than this field
            content.append(self.more)
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).digest()

    @property
    def _more(self) -> dict[str, Any]:
        return json.loads(self.more) if self.more else {}


def _bytes(value: object) -> int:
    if value is None:
        return 0
    return len((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode())
