"""Ctrl-C in the middle of training, in a real process: nothing is stored, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any


def test_an_interrupted_add_domain_resumes(run, bare, rows, tmp_path, document):
    data = rows(tmp_path / "new.jsonl", "legal")
    options = ["--data", str(data), "--steps", "120", "--block", "32", "--batch", "1", "--rank", "2"]
    # many steps, so that a busy machine does not end the run before this process has seen its first checkpoint
    words = ["add-domain", "contracts", *options, "--checkpoint-every", "5"]

    code, said = _interrupted(words, bare)

    assert code == 130, said
    assert said.rstrip().endswith("Interrupted. Repeat the same command to resume.")
    assert "Traceback" not in said
    assert [domain["name"] for domain in document(run("list", "--json", store=bare))["domains"]] == ["general"]

    found = document(run(*words, "--json", store=bare))

    assert found["resumed_from"] > 0
    assert found["resumed_from"] % 5 == 0


def _interrupted(words: list[str], store) -> tuple[int, str]:
    """Runs the command and presses Ctrl-C once a checkpoint of its training is there."""
    command = [sys.executable, "-m", "lorary.cli", *words, "--store", str(store)]
    settings = os.environ | {"LORARY_DEBUG": "", "NO_COLOR": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a shell starts what runs in its background, these tests for one, with Ctrl-C ignored, and children inherit that
    with subprocess.Popen(command, env=settings, preexec_fn=_listen_to_interrupts, **pipes) as process:
        assert process.stderr is not None
        said = ""
        while "training" not in said and (line := process.stderr.readline()):
            said += line
        until = time.monotonic() + 60
        while not _checkpoints(store) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be interrupted"
        process.send_signal(signal.SIGINT)
        return process.wait(60), said + process.stderr.read()


def _listen_to_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _checkpoints(store) -> list:
    found = store.glob("runs/contracts-*/checkpoint-*/trainer_state.json")
    return [path for path in found if _is_json(path.read_text(encoding="utf-8"))]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
