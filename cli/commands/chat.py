"""`registry chat`: a conversation with a composition, on the terminal or from a pipe.

On a terminal an answer appears while it is made; Ctrl-C ends it and keeps the session, Ctrl-D leaves. From a pipe each
line is a question or a command, and stdout has the answers; the first error ends the session with its exit code.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from ...domains.errors import InputError, LoraryError
from ..options import (
    Device,
    Dtype,
    Json,
    MaxNewTokens,
    Raw,
    Seed,
    Spec,
    Static,
    Stop,
    StorePath,
    Temperature,
    TopK,
    TopP,
)
from ..show import output
from ..show.page import Page, cell, fields
from ..show.progress import show_progress
from ..show.slots import answer_data, answer_hints, legend, routed_text, shares
from ..startup import open_registry
from .compose import plan_composition
from .pull import pull_named_packs

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.compose.chat import Conversation
    from ...registry.compose.generate import Answer

PROMPT: Final = "> "
COMMANDS: Final = {
    "/route": "which domain each token of the last answer came from",
    "/compose SPEC": "go on with another composition; without SPEC, name this one",
    "/reset": "forget what was said",
    "/help": "show this",
    "/quit": "leave; so does Ctrl-D",
    "//text": "say something that begins with /",
}


def chat(
    spec: Spec,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    stop: Stop = None,
    seed: Seed = 0,
    raw: Raw = False,
    static: Static = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Chat with a composition. Type /help for the commands; Ctrl-C stops an answer, Ctrl-D leaves.

    Each question is answered with all that was said before. From a pipe, each line is a question or a command; with
    --json all answers are printed as one document at the end.

    Example: registry chat medicine+legal
    """
    registry = open_registry(store, device=device, dtype=dtype)
    if not raw and registry.base_record.chat_template is None:
        raise InputError(
            "The base model cannot chat: its tokenizer has no chat template.",
            fix=f"make a registry for an instruct version; or continue text: registry chat {spec} --raw",
        )
    session = Session(registry, static=static, as_json=as_json)
    session.begin(
        spec,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop or (),
        seed=seed,
        raw=raw,
    )
    for text in output.read_lines(PROMPT):
        if not session.take(text):
            break
    if as_json:
        output.show(Page(data=session.data()), command="chat", as_json=True)


class Session:
    """What the lines of a chat do: questions, and commands that begin with /.

    Attributes:
        spec: The composition that answers.
        answered: What was asked and answered, for --json; what /reset forgets is kept here.
    """

    def __init__(self, registry: "Registry", *, static: bool, as_json: bool):
        self.registry, self.static, self.as_json = registry, static, as_json
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
        self.spec = ""
        self.last: Answer | None = None
        self.answered: list[dict[str, Any]] = []
        self.conversation: Conversation

    def begin(self, spec: str, **settings: Any) -> None:
        """Compose, and begin the conversation."""
        self.conversation = self.registry.chat(self._compose(spec), **settings)
        if self.is_interactive:
            output.hint(f"{self.spec} answers. /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves.")

    def take(self, text: str) -> bool:
        """Do what a line says; return whether the session goes on.

        Raises:
            LoraryError: Something went wrong, and the lines come from a pipe.
        """
        try:
            return self._take(text.strip())
        except LoraryError as error:
            if not self.is_interactive:
                raise
            output.show_error({"message": error.message, "cause": error.cause, "fix": error.fix}, as_json=False)
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
            output.hint("Interrupted; nothing was changed.")
        return True

    def data(self) -> dict[str, Any]:
        """Return the session for --json."""
        return {"composition": self.spec, "turns": self.answered}

    def _take(self, text: str) -> bool:
        if not text.startswith("/") or text.startswith("//"):
            if text:
                self._ask(text[1:] if text.startswith("//") else text)
            return True
        command, _, rest = text.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/reset":
            self.conversation.reset()
            self.last = None
            self._say("What was said is forgotten.")
        elif command == "/compose":
            self._switch(rest.strip())
        elif command == "/route":
            self._show_route()
        elif command == "/help":
            if not self.as_json:
                output.show_blocks(fields((name, cell(meaning)) for name, meaning in COMMANDS.items()))
        else:
            raise InputError(
                f"There is no command {command}.", fix="type /help; a question that begins with / needs //"
            )
        return True

    def _ask(self, question: str) -> None:
        streamer = _streamer(self.registry.tokenizer) if self.is_interactive else None
        with _stopped_by_ctrl_c(self.is_interactive) as stopped:
            answer = self.conversation.ask(question, streamer=streamer, should_stop=stopped.is_set)
        self.last = answer
        self.answered.append({"composition": self.spec, "question": question, **answer_data(answer)})
        if self.as_json:
            return
        output.write_piece("\n" if self.is_interactive else answer.text.strip("\n") + "\n")
        for hint in self._hints(answer):
            output.hint(hint)

    def _hints(self, answer: "Answer") -> Iterator[str]:
        """Yield what the text of an answer does not say."""
        if answer.empty_because:
            yield f"{answer_hints(answer)[0]} The question is not kept; ask it in another way."
        elif answer.finish == "interrupted":
            yield "Stopped; the conversation goes on."
        elif self.conversation.is_full(answer):
            context = self.conversation.context
            yield f"The answer ends here: the context of {context} tokens is full. /reset starts over."
        elif answer.finish == "length":
            yield f"The answer ends here: it has {answer.new_tokens} tokens, the most that --max-new-tokens allows."

    def _switch(self, spec: str) -> None:
        if not spec:
            self._say(self.spec)
            return
        self.conversation.model = self._compose(spec)
        self._say(f"{self.spec} answers from here on; what was said is kept.")

    def _show_route(self) -> None:
        if self.last is None:
            raise InputError("There is no answer yet.", fix="ask something first")
        if self.as_json:
            return
        new = self.last.tokens[len(self.last.tokens) - self.last.new_tokens :]
        output.show_blocks(
            legend(self.last.slots),
            routed_text(new),
            shares(self.last.route, self.last.slots, heading="MEAN GATE"),
        )

    def _compose(self, spec: str) -> Any:
        spec = pull_named_packs(self.registry, spec, as_json=self.as_json)
        plan = plan_composition(self.registry, spec, static=self.static)
        with show_progress("composing", as_json=self.as_json):
            model = self.registry.compose(spec, static=self.static)
        self.spec = str(plan.composition)
        return model

    def _say(self, text: str) -> None:
        if not self.as_json:
            output.hint(text)


@contextmanager
def _stopped_by_ctrl_c(is_interactive: bool) -> Iterator[threading.Event]:
    """Make Ctrl-C end the answer at its next token; a second one interrupts as usual."""
    stopped = threading.Event()
    if not is_interactive:
        yield stopped
        return

    def stop(*_: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _streamer(tokenizer: Any) -> Any:
    """Make a streamer that writes the answer to stdout, without the prompt."""
    from transformers import TextStreamer

    class Written(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            output.write_piece(text)

    return Written(tokenizer, skip_prompt=True, skip_special_tokens=True)
