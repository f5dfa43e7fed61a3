"""Writes what a release makes into a folder that is kept for ever, so that every later commit can be held to it.

    python tests/golden/make.py tests/golden/v0.2

It goes through `registry` and the front door only, so that it runs at any commit. README.md beside it says what is in
the folder, and when one is made.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

# before torch is imported: the order of sums, and so the last bits, depend on it
os.environ["OMP_NUM_THREADS"] = "1"

INPUTS = Path(__file__).resolve().with_name("inputs")
WRITTEN = ("store", "saved", "exports")  # what the commands of the first phase leave behind
DISPOSABLE = ("cache", "ballast", "checkpoint-*")
PROGRAMS = ("lorary", "torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "faiss-cpu")

SHORT = "--steps 3 --block 64 --batch 2"
PROMPT = "Knead the dough, then prune the hedge."  # which three slots share
# --json and --store are added to each
MAKING = {
    "init": f"init --base base --data data/general.jsonl --rank 2 --experts 1 {SHORT}",
    "add-cooking": f"add-domain cooking --data data/cooking.jsonl --rank 2 {SHORT}",
    # a second generation of experts, of another rank
    "retrain-extend": f"retrain cooking --data data/baking.jsonl --rank 3 --experts 1 --tolerance 1 {SHORT}",
    "alias-set": "alias cooking@1 stable",
    "add-sailing": "add-domain sailing --data data/sailing.jsonl --rank 3 --method rslora --experts 1"
    f" --targets q_proj,v_proj,down_proj --schedule uniform --no-rank-gates {SHORT}",
    # it forgets, so it is held back
    "retrain-continue": "retrain sailing --data data/gardening.jsonl --mode continue --learning-rate 3"
    f" --tolerance 0 {SHORT}",
    "retrain-fresh": f"retrain cooking --data data/baking.jsonl --mode fresh --rank 1 --tolerance 9 {SHORT}",
    "remove": "remove cooking@3 --yes",
    "import": "import notes adapter --same-base --data data/gardening.jsonl",
    "compose-out": "compose sailing@2:2+notes --out saved",
    "export-tar": "export notes --to tar --out exports/notes.tar",
    "export-peft": "export cooking@1 --to peft --out exports/cooking",
    "export-vllm": "export sailing --to vllm --out exports/sailing --served-base tiny",
    "export-static": "export sailing:0.7+notes:0.3 --static --to peft --out exports/sailing+notes",
}
LOOKING = {
    "list": "list",
    "show-general": "show general",
    "show-cooking": "show cooking",
    "show-alias": "show cooking@stable",
    "show-held-back": "show sailing@2",
    "show-imported": "show notes",
    "show-files": "show cooking --files",
    "show-manifest": "show notes --manifest",
    "log": "log",
    "log-cooking": "log cooking",
    "diff-extended": "diff cooking@1 cooking@2",
    "diff-continued": "diff sailing@1 sailing@2",
    "alias-list": "alias cooking",
    "verify": "verify",
    "verify-deep": "verify notes --deep",
    "gc": "gc --dry-run --older-than 0m",
    "compose": "compose cooking+sailing",
    "compose-static": "compose cooking@1:0.7+notes:0.3 --static",
    "compose-saved": "compose ./saved",
    "compose-prompt": f"compose cooking+sailing --prompt '{PROMPT}' --max-new-tokens 8",
    "generate": f"generate cooking+notes '{PROMPT}' --show-route --max-new-tokens 12",
    "generate-chat": f"generate ./saved '{PROMPT}' --chat --max-new-tokens 12",
    "generate-sampled": f"generate notes '{PROMPT}' --temperature 1 --seed 7 --max-new-tokens 12",
    "route": f"route '{PROMPT}'",
    "route-in": f"route '{PROMPT}' --in sailing@2+notes",
    "evaluate": "evaluate cooking+sailing+notes",
    "evaluate-data": "evaluate cooking@1 --data data/baking.jsonl --no-questions",
    "report": "report --max-bytes 2000",
    "report-gate": "report --max-bytes 2000 --domains cooking@1,sailing --gate retention>=2",
    "export-merged": "export cooking --to merged --out merged",
    "no-such-domain": "show knitting",
    "removed-version": "compose cooking@3",
    "domain-exists": "add-domain sailing --data data/sailing.jsonl",
    "bad-row": "add-domain knitting --data adapter/adapter_config.json",
    "no-adapter": "import knitting saved --data data/baking.jsonl",
    "export-routed": "export cooking+sailing --to peft --out exports/refused",
}
# with a Hub of our own; `fresh` is a copy of the store that has KP alone, once gc has been there
HUB = {
    "gc-fresh": "gc --older-than 0m --store fresh",
    "push-dry": "push cooking acme/lorary-cooking --dry-run",
    "push": "push cooking acme/lorary-cooking",
    "push-again": "push cooking acme/lorary-cooking",
    "pull": "pull acme/lorary-cooking@v2 --store fresh",
    "pull-again": "pull acme/lorary-cooking@v2 --store fresh",
    "pull-as": "pull hf://acme/lorary-cooking --as kitchen --store fresh",
    "search": "search cooking",
}
PHASES = {"making": MAKING, "looking": LOOKING, "hub": HUB}
COMPOSED = (
    ("general", False),
    ("cooking@1", False),
    ("cooking", False),
    ("cooking+sailing", False),
    ("cooking:0.7+sailing@2:0.3", False),
    ("notes+sailing", False),
    ("cooking@1", True),
    ("sailing:0.7+notes:0.3", True),
    ("./saved", False),
)
TOKENS = [1, *(7 + 37 * place % 290 for place in range(23))]


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What a command did."""

    exit: int
    stdout: str
    stderr: str

    @property
    def error(self) -> dict[str, Any] | None:
        """The error on stderr, which ends with it."""
        lines = [json.loads(line) for line in self.stderr.splitlines() if line.startswith('{"error"')]
        return lines[-1]["error"] if lines else None


def run(words: Sequence[str]) -> Printed:
    """Runs the installed program `registry` in this process."""
    main = next(iter(entry_points(group="console_scripts", name="registry"))).load()
    out, err, arguments, status = io.StringIO(), io.StringIO(), sys.argv, 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv = ["registry", *words]
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = arguments
    return Printed(exit=status, stdout=relative(out.getvalue()), stderr=err.getvalue())


def relative(text: str) -> str:
    """The text with paths as seen from the folder in which we stand."""
    text = text.replace(f"{Path.cwd()}/", "").replace(str(Path.cwd()), ".")
    return re.sub(r"http://127\.0\.0\.1:\d+", "https://hub", text)


def lay_out(release: Path | None, work: Path) -> None:
    """Copies the inputs, and what a release has written, to where commands can work on them."""
    for source in [INPUTS, *([] if release is None else [release / name for name in WRITTEN])]:
        there = work if source == INPUTS else work / source.name
        # not their times: what gc finds old does not depend on when somebody cloned the repository
        shutil.copytree(source, there, copy_function=shutil.copyfile, dirs_exist_ok=True)
    if release is not None:
        (work / "store" / "cache").mkdir()
        empty = shutil.ignore_patterns("cooking", "sailing", "notes", "runs")
        shutil.copytree(work / "store", work / "fresh", ignore=empty)


@contextlib.contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    """Makes a folder the current one, in an environment that changes nothing of what commands print."""
    before, environment = os.getcwd(), dict(os.environ)
    quiet = {"FORCE_COLOR": "", "LORARY_DEBUG": "", "LORARY_STORE": "", "COLUMNS": "120"}
    os.environ.update(quiet)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)


def logits_of(composition: str, *, static: bool) -> list[float]:
    """Logits of a composed model at the last of some fixed tokens: every tenth of the vocabulary."""
    import torch

    from lorary.registry import Registry

    model = Registry.open("store").compose(composition, static=static)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([TOKENS])).logits[0, -1, ::10]
    return [round(value, 6) for value in logits.tolist()]


def make(out: Path) -> None:
    """Writes a release into a new folder."""
    out.mkdir(parents=True)
    commands: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, standing_in(Path(folder)):
        lay_out(None, Path.cwd())
        commands += _record(out, "making")
        for path in [Path("store/store.json"), *Path("store/runs").glob("*/run.json")]:
            path.write_text(relative(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
        for name in WRITTEN:
            ignored = shutil.ignore_patterns(*DISPOSABLE)
            shutil.copytree(name, out / name, ignore=ignored, copy_function=shutil.copyfile)
    with tempfile.TemporaryDirectory() as folder, standing_in(Path(folder)):
        lay_out(out, Path.cwd())
        commands += _record(out, "looking")
        logits = [
            {"composition": name, "static": static, "logits": logits_of(name, static=static)}
            for name, static in COMPOSED
        ]
        digests = digests_of("store")
        with _hub(Path.cwd()):
            commands += _record(out, "hub")
    _write(out / "commands.json", commands)
    _write(out / "digests.json", digests)
    _write(out / "logits.json", logits)
    _write(out / "made_with.json", _made_with())


def digests_of(store: str) -> dict[str, dict[str, Any]]:
    """Of every version, removed ones too: the digests of its content and of its manifest's bytes, and of its files."""
    from lorary.registry import Registry

    stored = Registry.open(store).store
    return {
        f"{name}@{manifest.version}": {
            "content": manifest.digest,
            "manifest": f"sha256:{hashlib.sha256(manifest.to_json()).hexdigest()}",
            "files": {file.path: file.sha256 for file in manifest.files},
        }
        for name in stored.domains(removed=True)
        for manifest in stored.history(name)
    }


def _record(out: Path, phase: str) -> list[dict[str, Any]]:
    commands = []
    (out / "printed").mkdir(exist_ok=True)
    for name, text in PHASES[phase].items():
        words = f"{text} --json"
        if "--store" not in words and not words.startswith("search"):
            words += " --store store"
        printed = run(shlex.split(words))
        print(f"{printed.exit} {words}", file=sys.stderr)
        if printed.exit and not printed.error:
            raise RuntimeError(printed.stderr)
        (out / "printed" / f"{name}.json").write_text(printed.stdout, encoding="utf-8", newline="\n")
        command = {"name": name, "phase": phase, "words": words, "exit": printed.exit}
        commands.append(command | ({"error": printed.error} if printed.error else {}))
    return commands


@contextlib.contextmanager
def _hub(folder: Path) -> Iterator[None]:
    """A running Hub of our own, as tests/conftest.py has it, which is empty."""
    from huggingface_hub import constants, hf_api

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from hub_server.server import HubServer

    with HubServer(folder / "hub") as hub:
        os.environ["HF_TOKEN"] = "hf_alice"
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(folder / "hf-home" / "hub"),
            "HF_TOKEN_PATH": str(folder / "hf-home" / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in settings.items():
            setattr(constants, name, value)
        hf_api.api.endpoint = hub.url
        yield


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8", newline="\n")


def _made_with() -> dict[str, str]:
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=INPUTS, check=True, capture_output=True, text=True).stdout.strip()
    programs = {program: version(program) for program in PROGRAMS}
    return {"commit": commit, "python": platform.python_version(), "machine": platform.machine(), **programs}


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
