"""The chat: from a pipe, as JSON, and on a terminal with Ctrl-C and Ctrl-D."""

import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorary.registry.store.seals import write_sealed

SHORT = ["--max-new-tokens", "4", "--temperature", "0.7", "--seed", "3"]


def test_each_line_of_a_pipe_is_answered_on_stdout(run: Any, store: Path) -> None:
    talk = run("chat", "medicine+legal", *SHORT, store=store, input="The patient?\n\n//etc\n")
    alone = run("generate", "medicine+legal", "The patient?", *SHORT, store=store)

    assert talk.exit_code == 0
    assert talk.stdout.startswith(alone.stdout)
    assert len(talk.stdout) > len(alone.stdout)
    assert "> " not in talk.stdout


def test_a_session_is_one_json_document(run: Any, store: Path, document: Any) -> None:
    lines = "The patient?\n/route\n/compose legal\nThe court?\n/help\n/reset\nThe court?\n/quit\nnever read\n"

    found = document(run("chat", "medicine+legal", *SHORT, "--json", store=store, input=lines))

    assert found["command"] == "chat"
    assert [turn["question"] for turn in found["turns"]] == ["The patient?", "The court?", "The court?"]
    assert [turn["composition"] for turn in found["turns"]] == ["legal+medicine", "legal", "legal"]
    assert [turn["slots"][1:] for turn in found["turns"]] == [["legal", "medicine"], ["legal"], ["legal"]]
    lengths = [turn["prompt_tokens"] for turn in found["turns"]]
    assert lengths[1] > lengths[0] + 4 > lengths[2]  # with what was said, and without


def test_the_route_shows_the_answer_alone(run: Any, store: Path) -> None:
    result = run("chat", "medicine+legal", *SHORT, store=store, input="The patient?\n/route\n")

    routed = "".join(re.findall(r"\[\d:(.*?)\]", result.stdout, flags=re.DOTALL))
    assert routed
    assert "The patient?" not in routed
    assert "MEAN GATE" in result.stdout


@pytest.mark.parametrize(
    ("lines", "code", "problem"),
    [
        ("/route\n", 2, "no answer yet"),
        ("/rout\n", 2, "no command /rout"),
        ("/compose nothing\n", 3, "nothing"),
        ("mast " * 600 + "\n", 2, "/reset"),
    ],
)
def test_the_first_error_of_a_pipe_ends_it_with_its_code(
    run: Any, store: Path, lines: str, code: int, problem: str
) -> None:
    result = run("chat", "medicine", *SHORT, store=store, input=lines)

    assert result.exit_code == code
    assert problem in result.stderr
    assert "Fix: " in result.stderr


def test_a_base_without_a_template_chats_only_raw(run: Any, tmp_path: Path, store: Path) -> None:
    settings = json.loads((store / "store.json").read_text(encoding="utf-8"))
    copied = tmp_path / "plain"
    shutil.copytree(store, copied)
    settings["settings"]["base"]["chat_template"] = None
    write_sealed(copied / "store.json", json.dumps(settings).encode())

    refused = run("chat", "medicine", store=copied, input="The patient?\n")

    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[0] == "Error: The base model cannot chat: its tokenizer has no chat template."
    assert "--raw" in refused.stderr
    assert run("chat", "medicine", "--raw", *SHORT, store=store, input="The patient\n").exit_code == 0


def test_an_empty_answer_says_why_on_stderr(run: Any, store: Path, document: Any) -> None:
    full = document(run("generate", "medicine", "The patient", *SHORT, "--json", store=store))
    stop = ["--stop", full["text"][0]]

    result = run("generate", "medicine", "The patient", *SHORT, *stop, store=store)

    assert (result.exit_code, result.stdout) == (0, "\n")
    assert re.search(r"^The answer is empty: a stop string came after \d tokens? without text\.$", result.stderr, re.M)
    found = document(run("generate", "medicine", "The patient", *SHORT, *stop, "--json", store=store))
    assert (found["text"], found["finish"]) == ("", "stop")
    talk = run("chat", "medicine", *SHORT, *stop, store=store, input="The patient\n")
    assert "The question is not kept" in talk.stderr


def test_chat_is_the_default_and_its_old_option_is_accepted(run: Any, store: Path) -> None:
    said = [
        run("generate", "medicine", "The patient", *SHORT, *more, store=store) for more in ([], ["--chat"], ["--raw"])
    ]

    assert [result.exit_code for result in said] == [0, 0, 0]
    assert said[0].stdout == said[1].stdout
    assert run("generate", "medicine", "The", "--chat", "--raw", store=store).exit_code == 2
    assert "--chat" not in run("generate", "--help").stdout


# --- on a terminal ---


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *words: str, store: Path):
        self.shown = ""
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.environ.update(LORARY_STORE=str(store), NO_COLOR="1", TERM="xterm", COLUMNS="200")
            os.execv(sys.executable, [sys.executable, "-m", "lorary.cli", *words])

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, text: str, *, times: int = 1, seconds: float = 120) -> str:
        """Reads until the text was shown so many times."""
        end = time.monotonic() + seconds
        while self.shown.count(text) < times:
            assert time.monotonic() < end, self.shown
            if select.select([self.terminal], [], [], 1)[0]:
                try:
                    self.shown += os.read(self.terminal, 4096).decode(errors="replace")
                except OSError:
                    break
        assert self.shown.count(text) >= times, self.shown
        return self.shown

    def code(self) -> int:
        while True:  # what it still writes must be read, or it does not end
            try:
                if not os.read(self.terminal, 4096):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_keeps_the_session_and_ctrl_d_leaves(store: Path) -> None:
    words = ["chat", "medicine+legal", "--max-new-tokens", "400", "--temperature", "1.5"]
    terminal = Terminal(*words, store=store)

    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.type("The patient?\n")
    terminal.wait_for("The patient?")
    time.sleep(0.3)
    os.kill(terminal.process, signal.SIGINT)
    shown = terminal.wait_for("> ", times=2)
    assert "Stopped" in shown or "The answer" in shown
    terminal.type("/nonsense\n")
    terminal.wait_for("no command /nonsense")
    terminal.type("/route\n")
    terminal.wait_for("MEAN GATE")
    terminal.wait_for("> ", times=4)
    terminal.type("half a question\x03")  # at the prompt it only drops the line
    terminal.wait_for("> ", times=5)
    terminal.type("/compose legal\n")
    terminal.wait_for("legal answers from here on")
    terminal.wait_for("> ", times=6)
    terminal.type("\x04")

    assert terminal.code() == 0
