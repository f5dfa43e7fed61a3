"""Scores of models on domains, each computed once and stored as a line of JSON."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from method import Scored
from streams import Domain
from torch import nn
from transformers import PreTrainedTokenizerBase

from lorary.domains.data.corpus import corpus_digest
from lorary.domains.scoring.choices import score_choices
from lorary.domains.scoring.language import confidence_interval, score_language

Cell = Mapping[str, Any]  # bits, interval, bytes; with questions also accuracy, accuracy_interval, asked


class ScoreBook:
    """File of scores, one line per model, test and metric."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase):
        self.path = path
        self.tokenizer = tokenizer
        self._known: dict[tuple[str, str], Cell] = {}
        self._built: tuple[str, nn.Module] | None = None
        self._digests: dict[int, str] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._known[entry.pop("model"), entry.pop("test")] = entry

    def cell(self, scored: Scored, column: Domain, *, with_questions: bool) -> Cell:
        """Return a model's scores on one domain."""
        cell = dict(self._entry(scored, f"bits:{self._digest(column, 'texts')}", self._bits, column))
        if with_questions and column.questions:
            test = f"accuracy:{self._digest(column, 'questions')}"
            cell |= self._entry(scored, test, self._accuracy, column)
        return cell

    def _entry(
        self, scored: Scored, test: str, measure: Callable[[nn.Module, Domain], dict[str, Any]], column: Domain
    ) -> Cell:
        if (scored.id, test) not in self._known:
            entry = measure(self._model(scored), column)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                line = {"model": scored.id, "test": test, "of": column.name, **entry}
                file.write(json.dumps(line) + "\n")
            self._known[scored.id, test] = entry
        return self._known[scored.id, test]

    def _bits(self, model: nn.Module, column: Domain) -> dict[str, Any]:
        score = score_language(model, self.tokenizer, column.texts)
        return {"bits": score.bits_per_byte, "interval": confidence_interval(score), "bytes": score.bytes}

    def _accuracy(self, model: nn.Module, column: Domain) -> dict[str, Any]:
        score = asdict(score_choices(model, self.tokenizer, column.questions, batch=64))
        return {"accuracy": score["accuracy"], "accuracy_interval": score["interval"], "asked": score["total"]}

    def _model(self, scored: Scored) -> nn.Module:
        """Return the model, cached while consecutive columns use it."""
        if self._built is None or self._built[0] != scored.id:
            self._built = None
            self._built = (scored.id, scored.build())
        return self._built[1]

    def _digest(self, column: Domain, part: str) -> str:
        examples = getattr(column, part)
        if id(examples) not in self._digests:
            self._digests[id(examples)] = corpus_digest(examples)[7:23]
        return self._digests[id(examples)]
