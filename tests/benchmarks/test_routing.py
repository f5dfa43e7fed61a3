"""The routing benchmark runs end to end on small data; its figures are in docs/benchmarks.md."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorary.adapters.config import TrainingConfig
from lorary.domains.data.catalog import builtin_domains
from lorary.registry import Registry

SCRIPT = Path(__file__).with_name("routing.py")
PAGE = Path(__file__).with_name("routing_page.py")
ROOT = SCRIPT.parents[2]
FIELDS = ("general", "medicine", "legal")
INTENTS = {"travel": ("flight", "hotel", "visa", "passport"), "home": ("lamp", "heating", "door", "playlist")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundled text as three fields, and made-up questions of two domains."""
    folder = tmp_path_factory.mktemp("data")
    for field in FIELDS:
        corpus = builtin_domains()[field].corpus
        assert corpus is not None
        lines = corpus.read_text(encoding="utf-8").splitlines()
        write(folder / field / "lm.train.jsonl", lines[::2])
        write(folder / field / "lm.test.jsonl", lines[1::2])
    for domain, things in INTENTS.items():
        rows = [
            json.dumps({"prompt": f"User: {verb} my {thing}\nIntent:", "completion": thing})
            for thing in things
            for verb in ("find", "what about", "please change", "tell me all about", "i do not like")
        ]
        for split in ("train", "validation", "test"):
            write(folder / "clinc150" / f"{domain}.{split}.jsonl", rows)
    banking = [
        json.dumps({"prompt": f"Customer: my card {i} is lost\nIntent:", "completion": "lost"}) for i in range(9)
    ]
    write(folder / "finance" / "banking77.train.jsonl", banking)
    return folder


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(script: Path, *arguments: str | Path) -> str:
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows_of(result: dict[str, Any], start: str) -> list[dict[str, Any]]:
    return next(rows for title, rows in result.items() if title.startswith(start))


def test_every_part_that_trains_nothing_is_in_the_result_and_on_the_page(data: Path, tmp_path: Path):
    out, page = tmp_path / "tiny.json", tmp_path / "page.md"
    page.write_text("before\n<!-- routing: begin -->\nstale\n<!-- routing: end -->\nafter\n", encoding="utf-8")

    run(SCRIPT, "--data", data, "--quick", "--streams", "2", "--out", out)
    run(PAGE, page, out)

    result = json.loads(out.read_text())
    assert result["environment"]["base"] == "pocket"
    clinc = rows_of(result, "CLINC150")
    assert {row["router"] for row in clinc} == {
        "ours, plain",
        "ours, chat",
        "joint logistic regression",
        "Any-SSR",
        "LORAUTER, the base's embedding",
    }
    joint = next(row for row in clinc if row["router"].startswith("joint"))
    assert joint["right slot"] > 0.9  # it is tested on what it was fitted to
    assert {row["prompts"] for row in clinc} == {40}
    assert len(rows_of(result, "The next 512")) == 3 + 6 + 1
    mixed = rows_of(result, "Five sentences")
    assert {(row["as"], row["prompts"]) for row in mixed} == {("plain", 40), ("chat", 40)}
    chat = rows_of(result, "Questions")
    assert {(row["questions"], row["prompts"]) for row in chat} == {
        (name, 40) for name in ("everyday", "medicine", "legal", "banking")
    }
    assert rows_of(result, "Router of 4 domains")[0]["build s"] > 0
    shares = [row[key] for rows in (clinc, mixed, chat) for row in rows for key in ("right slot", "mean gate")]
    assert all(0 <= share <= 1 for share in shares)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    assert f"| {clinc[0]['right slot']:.3f} |" in text


@pytest.mark.slow
def test_loss_of_a_stored_composition(data: Path, tmp_path: Path):
    store, out = tmp_path / "store", tmp_path / "loss.json"
    recipe = TrainingConfig(steps=1, block=64)
    registry = Registry.init(store, training=recipe)
    for field in FIELDS[1:]:
        registry.add_domain(field, data=[data / field / "lm.train.jsonl"], training=recipe)

    run(SCRIPT, "--only", "loss", "--store", store, "--data", data, "--streams", "1", "--out", out)

    rows = rows_of(json.loads(out.read_text()), "Nats")
    assert len(rows) == 3 + 4 + 3
    assert all(0 < row[key] < 12 for row in rows for key in ("routed", "right slot", "base"))


def test_the_questions_are_160_and_differ():
    rows = [json.loads(line) for line in SCRIPT.with_name("questions.jsonl").read_text(encoding="utf-8").splitlines()]

    assert len({row["text"] for row in rows}) == len(rows) == 160
    assert {row["domain"] for row in rows} == {"everyday", "medicine", "legal", "banking"}


def test_the_page_shows_the_stored_results(tmp_path: Path):
    page = ROOT / "docs" / "benchmarks.md"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")

    run(PAGE, copy, *sorted((ROOT / "docs" / "results").glob("routing-*.json")))

    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
