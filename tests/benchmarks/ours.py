"""lorary on a stream: init once, add_domain for each domain, all compositions read from the store.

The routed composition of KP and all domains so far is scored after each step. For each domain these are scored as well:

    alone       its own experts with slot gate 1: the oracle that defines the share of the oracle's gain
    explicit    the composition of KP and this domain only, once after it was added and once after the last step
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from method import Bench, Scored, Step, digest
from peft_adapters import BANK
from scores import ScoreBook
from streams import Domain
from torch import nn

from lorary.adapters.composition import GENERAL
from lorary.adapters.config import TrainingConfig
from lorary.adapters.layer.routing import routing_of
from lorary.adapters.router.evidence import token_evidence
from lorary.adapters.router.router import discriminant_rows
from lorary.domains.data.corpus import corpus_digest, read_examples
from lorary.domains.statistics.statistics import DomainStatistics
from lorary.registry import Registry
from lorary.registry.compose.build import read_packs
from lorary.registry.measure.evaluate import routing_accuracy
from lorary.registry.pack.pack import read_pack

MAX_KP_STEPS = 50  # enough to learn what general text looks like
ROOT = Path(__file__).resolve().parents[2]


def ours(bench: Bench, book: ScoreBook) -> Iterator[Step]:
    """Add the domains one by one; stored domains are not trained again."""
    registry = _registry(bench)
    version = code_version()
    for i, domain in enumerate(bench.domains):
        added = _added(registry, bench, book, domain)
        manifest = registry.show(domain.name)
        pack = read_pack(registry.store, manifest)
        so_far = [d.name for d in bench.domains[: i + 1]]
        routed = Scored(_id(registry, so_far, version), lambda so_far=so_far: registry.compose("+".join(so_far)))
        yield Step(
            name=domain.name,
            model_for=lambda _column, routed=routed: routed,
            trained_parameters=pack.bank.parameters,
            seconds=manifest.train["seconds"],
            steps=manifest.train["steps"],
            notes=added | _finals(registry, bench, book, domain, routed, is_last=domain is bench.domains[-1]),
        )


def order_invariance(statistics: list[DomainStatistics]) -> dict[str, float]:
    """Return the maximum relative difference between router rows for one order of domains and its reverse."""
    turned = [statistics[0], *statistics[:0:-1]]
    forward, reverse = discriminant_rows(statistics), discriminant_rows(turned)
    tokens = [token_evidence([one.token_counts for one in part]).T for part in (statistics, turned)]
    pairs_of = [token_evidence([one.pair_counts for one in part]).T for part in (statistics, turned)]
    order = [0, *range(len(statistics) - 1, 0, -1)]
    pairs = {
        "token_evidence": (tokens[0], tokens[1][order]),
        "pair_evidence": (pairs_of[0], pairs_of[1][order]),
        "rows": (forward.rows, reverse.rows[order]),
        "bias": (forward.bias[:, None], reverse.bias[order, None]),
    }
    return {name: ((a - b).norm(dim=1) / a.norm(dim=1)).max().item() for name, (a, b) in pairs.items()}


def code_version() -> str:
    """Return the last commit that changed the scored code, marked if the working tree differs from it."""
    paths = ["--", "adapters", "registry", "domains"]
    commit = _git("log", "-1", "--format=%h", *paths)
    return commit + ("+changes" if _git("status", "--porcelain", *paths) else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=False, capture_output=True, text=True)
    return done.stdout.strip()


def _registry(bench: Bench) -> Registry:
    """Return the registry of this recipe and order; all share a KP bank that is trained once."""
    kp_recipe = TrainingConfig(seed=bench.recipe.seed, most_steps=MAX_KP_STEPS)
    text = bench.general and corpus_digest(read_examples([bench.general]))
    kp = bench.out / "ours" / f"kp-{digest([asdict(kp_recipe), asdict(BANK), text])}"
    if not (kp / "domains" / GENERAL).is_dir():
        data = [bench.general] if bench.general else []
        Registry.init(kp, data=data, bank=BANK, training=kp_recipe, on_progress=bench.on_progress)
    names = [domain.name for domain in bench.domains]
    store = bench.out / "ours" / digest([kp.name, asdict(bench.recipe), names])
    if not store.is_dir():
        unfinished = store.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(kp, unfinished)
        unfinished.rename(store)
    return Registry.open(store)


def _added(registry: Registry, bench: Bench, book: ScoreBook, domain: Domain) -> dict[str, Any]:
    """Add a domain unless it is stored; scores right after the addition are kept beside the store."""
    notes = registry.store.path.with_suffix(".json")
    known: dict[str, Any] = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    if domain.name not in known:
        if not registry.store.versions(domain.name):
            assert domain.source is not None
            registry.add_domain(
                domain.name, data=[domain.source], bank=BANK, training=bench.recipe, on_progress=bench.on_progress
            )
        manifest = registry.show(domain.name)
        by_digest = {registry.show(name).digest: name for name in registry.store.domains()}
        found = {"lender": by_digest.get(manifest.train["warm_start"]), "drift": manifest.proof["drift"]}
        found["explicit"] = book.cell(_explicit(registry, domain, "when added"), domain, with_questions=False)
        known[domain.name] = found
        notes.write_text(json.dumps(known), encoding="utf-8")
    return dict(known[domain.name])


def _finals(
    registry: Registry, bench: Bench, book: ScoreBook, domain: Domain, routed: Scored, *, is_last: bool
) -> dict[str, Any]:
    """Score every domain alone and explicit after the last step, and the accuracy of routing."""
    if not is_last:
        return {}
    model: Any = routed.build()
    found: dict[str, Any] = {"alone": {}, "explicit_at_the_end": {}, "routed_right": {}}
    for each in bench.domains:
        found["alone"][each.name] = book.cell(_alone(registry, each), each, with_questions=True)
        explicit = _explicit(registry, each, f"after {domain.name}")
        found["explicit_at_the_end"][each.name] = book.cell(explicit, each, with_questions=True)
        found["routed_right"][each.name] = routing_accuracy(model, bench.base, each.name, each.texts)
    packs = read_packs(registry.store, registry.plan("+".join(each.name for each in bench.domains)))
    return found | {"order_invariance": order_invariance([pack.statistics for pack in packs])}


def _explicit(registry: Registry, domain: Domain, when: str) -> Scored:
    """Return KP and one domain; `when` is part of the id, so that it is scored again."""
    return Scored(f"{_id(registry, [domain.name], code_version())} {when}", lambda: registry.compose(domain.name))


def _alone(registry: Registry, domain: Domain) -> Scored:
    def build() -> nn.Module:
        model = registry.compose(domain.name)
        routing_of(model).fixed = torch.tensor([0.0, 1.0])
        return model

    return Scored(f"{_id(registry, [domain.name], code_version())} alone", build)


def _id(registry: Registry, names: list[str], version: str) -> str:
    """Return the id of a composition: its packs and the version of the code."""
    digests = [registry.show(name).digest for name in (GENERAL, *names)]
    return f"ours-{digest(digests)} {version}"
