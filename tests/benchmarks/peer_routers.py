"""Routers of other methods, over the same texts and domains: each returns the share of every domain for a prompt.

Any-SSR     recursive least squares on the mean hidden state after four layers of the frozen base, expanded by a
            random linear map and ReLU to 10,000 features; the largest output takes all (Tong et al. 2025,
            arXiv:2503.13575). Fitted here at once by the dual of the same least squares, which has the same
            solution for any order of the rows.
LORAUTER    cosine of the prompt's sentence embedding and each task's mean embedding over some of its rows; the
            nearest three by the softmax of their similarities (Dhasade et al. 2026, arXiv:2601.21795). The encoder
            is a folder of transformers, pooled by the mean; without one, the base's own last hidden state.
joint       logistic regression on all domains' rows at once, on counts of tokens and pairs and the mean feature
            that the product's router reads; a bar, not a method that adds domains
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from product_router import Reading, pairs_of
from torch import Tensor

from lorary.domains.base_model import hidden_states_at, max_positions
from lorary.domains.statistics.statistics import PAIR_BUCKETS
from lorary.registry.base.load import LoadedBase

ANALYTIC_LAYER = 4  # and the three settings below: those of the authors' code
ANALYTIC_FEATURES = 10_000
REGULARISATIONS = (100.0, 1.0, 0.01)  # the authors' first, which suits hidden states of another model
NEAREST = 3
TEMPERATURE = 0.1  # of the cosines
BATCH = 32  # prompts

Embed = Callable[[Sequence[list[int]]], Tensor]  # token ids of prompts to (prompts, features)


def mean_hidden(base: LoadedBase, prompts: Sequence[list[int]], layer: int | None) -> Tensor:
    """Return the mean hidden state of each prompt before a decoder layer, each state scaled to a mean square of one.

    Args:
        layer: Index of the layer; None: after the last one.
    """
    longest = max_positions(base.model)
    found = torch.empty(len(prompts), base.layout.width)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        rows = [torch.tensor(prompts[i][:longest]) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        found[chosen] = masked_mean(_hidden(base, layer, ids, mask), mask)
    return found


@torch.inference_mode()
def _hidden(base: LoadedBase, layer: int | None, ids: Tensor, mask: Tensor) -> Tensor:
    inputs = {"input_ids": ids, "attention_mask": mask}
    if layer is not None:
        return hidden_states_at(base.model, base.layout, min(layer, base.layout.count - 1), **inputs)
    decoder: Any = base.model.get_submodule(base.layout.decoder)
    return decoder(**inputs, use_cache=False).last_hidden_state


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over real tokens of hidden states, each scaled to a mean square of one."""
    unit = torch.nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)
    return torch.where(mask[..., None].bool(), unit, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@dataclass
class AnalyticRouter:
    """Any-SSR's router."""

    rows: Tensor  # (rows, features), expanded
    solution: Tensor  # (rows, domains)
    expansion: torch.nn.Linear = field(repr=False)

    @classmethod
    def fit(
        cls, means: Tensor, domains: Tensor, *, regularisation: float = REGULARISATIONS[0], seed: int = 0
    ) -> "AnalyticRouter":
        """Fit the router to mean hidden states of rows of all domains.

        Args:
            means: One for each row.
            domains: Index of each row's domain.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expansion = torch.nn.Linear(means.shape[1], ANALYTIC_FEATURES)  # default initialization, as the authors'
        with torch.inference_mode():
            rows = expansion(means).relu().double()
        targets = torch.nn.functional.one_hot(domains).double()
        gram = rows @ rows.T + regularisation * torch.eye(len(rows), dtype=torch.float64)
        return cls(rows, torch.linalg.solve(gram, targets), expansion)

    @torch.inference_mode()
    def shares(self, means: Tensor) -> Tensor:
        """Return 1 for the domain with the largest output, (prompts, domains)."""
        outputs = self.expansion(means).relu().double() @ self.rows.T @ self.solution
        return torch.nn.functional.one_hot(outputs.argmax(1), outputs.shape[1]).float()


@dataclass
class NearestTasks:
    """LORAUTER's router."""

    tasks: Tensor  # (domains, features), unit vectors

    @classmethod
    def fit(cls, embeddings: Tensor, domains: Tensor) -> "NearestTasks":
        """Average the embeddings of each task's rows."""
        unit = torch.nn.functional.normalize(embeddings, dim=1)
        means = torch.stack([unit[domains == i].mean(0) for i in range(int(domains.max()) + 1)])
        return cls(torch.nn.functional.normalize(means, dim=1))

    def shares(self, embeddings: Tensor) -> Tensor:
        """Return the weights of the nearest tasks, (prompts, domains)."""
        cosines = torch.nn.functional.normalize(embeddings, dim=1) @ self.tasks.T
        nearest = cosines.topk(min(NEAREST, cosines.shape[1]), dim=1)
        weights = torch.softmax(nearest.values / TEMPERATURE, dim=1)
        return torch.zeros_like(cosines).scatter(1, nearest.indices, weights)


@dataclass(frozen=True)
class SentenceEncoder:
    """Embeds prompts by an encoder of transformers, from their text."""

    folder: Path
    base: LoadedBase  # its tokenizer decodes the prompts

    def __call__(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return the mean of each prompt's last hidden states."""
        from transformers import AutoModel, AutoTokenizer

        encoder, tokenizer = AutoModel.from_pretrained(self.folder), AutoTokenizer.from_pretrained(self.folder)
        found = []
        for first in range(0, len(prompts), BATCH):
            texts = [
                self.base.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts[first : first + BATCH]
            ]
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
            with torch.inference_mode():
                hidden = encoder(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            found.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(found)


def embedder(base: LoadedBase, encoder: Path | None) -> Embed:
    """Return what embeds prompts for LORAUTER."""
    return SentenceEncoder(encoder, base) if encoder else lambda prompts: mean_hidden(base, prompts, None)


@dataclass
class JointRegression:
    """Logistic regression on all rows at once."""

    model: Any
    scale: Any
    vocabulary: int
    columns: Any  # that any training row has

    @classmethod
    def fit(
        cls, rows: Sequence[Reading], domains: Sequence[int], *, vocabulary: int, strength: float
    ) -> "JointRegression":
        """Fit to prompts of all domains.

        Args:
            strength: Inverse of the regularisation, C of scikit-learn.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import MaxAbsScaler

        whole = _sparse_features(rows, vocabulary)
        columns = np.flatnonzero(whole.getnnz(axis=0))
        found = cls(LogisticRegression(C=strength, max_iter=500), MaxAbsScaler(), vocabulary, columns)
        found.model.fit(found.scale.fit_transform(whole[:, columns]), domains)
        return found

    def shares(self, rows: Sequence[Reading]) -> Tensor:
        """Return the probabilities, (prompts, domains)."""
        chosen = _sparse_features(rows, self.vocabulary)[:, self.columns]
        return torch.from_numpy(self.model.predict_proba(self.scale.transform(chosen))).float()


def _sparse_features(rows: Sequence[Reading], vocabulary: int) -> Any:
    """Return counts of tokens and hashed pairs, and the mean feature."""
    width = vocabulary + PAIR_BUCKETS
    columns = [torch.cat([row.ids, vocabulary + pairs_of(row.ids)]).numpy() for row in rows]
    owner = np.repeat(np.arange(len(rows)), [len(one) for one in columns])
    ones = np.ones(len(owner), dtype=np.float64)
    counts = scipy.sparse.csr_matrix((ones, (owner, np.concatenate(columns))), shape=(len(rows), width))
    means = torch.cat([masked_mean(row.hidden[None], torch.ones(1, len(row.ids))) for row in rows])
    return scipy.sparse.hstack([counts, scipy.sparse.csr_matrix(means.double().numpy())]).tocsr()
