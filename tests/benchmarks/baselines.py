"""Baselines that lorary is compared with, made of PEFT adapters.

    separate     one adapter per domain, selected by an oracle: no forgetting by construction
    sequential   one adapter, fine-tuned on the domains sequentially
    joint        one adapter with the total size and steps of all domains, trained on all of them at once
    olora        a new adapter per domain on top of the frozen earlier ones, with A orthogonal to theirs
                 (O-LoRA, Wang et al. 2023, arXiv:2310.14152)
    replay       sequential, with 5 % of each earlier domain's rows mixed in
    arrow        PEFT's Arrow over the separate adapters (Ostapenko et al. 2024, arXiv:2405.11157), without training
    xlora        PEFT's X-LoRA over the separate adapters (Buehler and Buehler 2024, arXiv:2402.07148); its classifier
                 is trained on 5 % of each domain's rows for as many steps as a domain
    anyssr       Any-SSR's router over the separate adapters (Tong et al. 2025, arXiv:2503.13575): least squares on the
                 prompts of all training rows so far; the adapter of the largest output takes all
    lorauter     LORAUTER's router over the separate adapters (Dhasade et al. 2026, arXiv:2601.21795): the three tasks
                 whose mean embeddings are nearest to the prompt's, by the softmax of their cosines

Trained adapters are shared between methods: the first step of four of them is the same adapter.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from method import Bench, Scored, Step, digest
from peft_adapters import Adapter, arrow_model, train_adapter, train_xlora, with_adapters, xlora_model
from routed_adapters import analytic_model, nearest_model
from streams import Domain
from torch import nn

from lorary.domains.data.example import Example

REPLAYED = 0.05  # fraction of an earlier domain's rows


def separate(bench: Bench) -> Iterator[Step]:
    """Train one adapter per domain; the oracle selects the bare base for general text."""
    known: dict[str, Scored] = {}
    for domain in bench.domains:
        adapter = _separate_adapter(bench, domain)
        known[domain.name] = Scored(adapter.id, partial(with_adapters, bench, [adapter]))
        choice = dict(known)
        yield _step(domain, [adapter], lambda column, choice=choice: choice.get(column, bench.base_scored))


def sequential(bench: Bench, *, replayed: float = 0.0) -> Iterator[Step]:
    """Fine-tune one adapter sequentially, with a fraction of the earlier domains' rows."""
    adapter, memory = None, []
    for domain in bench.domains:
        examples = domain.training_examples()
        adapter = train_adapter(bench, examples + memory, parent=adapter, name=domain.name)
        memory = memory + _sample(examples, replayed)
        scored = Scored(adapter.id, partial(with_adapters, bench, [adapter]))
        yield _step(domain, [adapter], lambda _column, scored=scored: scored)


def joint(bench: Bench) -> Iterator[Step]:
    """Train one adapter with the parameters and steps of all domains; there is only a last step."""
    examples = [example for domain in bench.domains for example in domain.training_examples()]
    adapter = train_adapter(bench, examples, times=len(bench.domains), name="joint")
    scored = Scored(adapter.id, partial(with_adapters, bench, [adapter]))
    yield _step(bench.domains[-1], [adapter], lambda _column: scored)


def olora(bench: Bench) -> Iterator[Step]:
    """Sum all adapters so far, each trained on top of the earlier ones and orthogonal to them."""
    adapters: list[Adapter] = []
    for domain in bench.domains:
        examples = domain.training_examples()
        adapters.append(train_adapter(bench, examples, frozen=tuple(adapters), name=domain.name))
        scored = Scored("olora-" + digest([a.id for a in adapters]), partial(with_adapters, bench, list(adapters)))
        yield _step(domain, [adapters[-1]], lambda _column, scored=scored: scored)


def arrow(bench: Bench) -> Iterator[Step]:
    """Route tokens over the separate adapters with Arrow, with PEFT's default settings."""
    adapters: list[Adapter] = []
    for domain in bench.domains:
        adapters.append(_separate_adapter(bench, domain))
        scored = Scored("arrow-" + digest([a.id for a in adapters]), partial(arrow_model, bench, list(adapters)))
        yield _step(domain, [adapters[-1]], lambda _column, scored=scored: scored)


def xlora(bench: Bench) -> Iterator[Step]:
    """Train X-LoRA's classifier over the separate adapters after the last one; there is only a last step."""
    adapters = [_separate_adapter(bench, domain) for domain in bench.domains]
    examples = [e for domain in bench.domains for e in _sample(domain.training_examples(), REPLAYED)]
    router = train_xlora(bench, adapters, examples)
    scored = Scored(router.id, partial(xlora_model, bench, adapters, router))
    step = _step(bench.domains[-1], [*adapters, router], lambda _column: scored)
    step.notes["router"] = {"parameters": router.parameters, "steps": router.steps, "rows": len(examples)}
    yield step


def routed(
    bench: Bench, name: str, build: Callable[[Bench, Sequence[Domain], Sequence[Adapter]], nn.Module]
) -> Iterator[Step]:
    """Route prompts over the separate adapters by a method without gradient steps."""
    adapters: list[Adapter] = []
    for i, domain in enumerate(bench.domains):
        adapters.append(_separate_adapter(bench, domain))
        so_far = bench.domains[: i + 1]
        encoder = bench.encoder and bench.encoder.name
        id = f"{name}-" + digest([[a.id for a in adapters], encoder if build is nearest_model else None])
        scored = Scored(id, partial(build, bench, so_far, list(adapters)))
        yield _step(domain, [adapters[-1]], lambda _column, scored=scored: scored)


METHODS: dict[str, Callable[[Bench], Iterator[Step]]] = {
    "separate": separate,
    "sequential": sequential,
    "joint": joint,
    "olora": olora,
    "replay": partial(sequential, replayed=REPLAYED),
    "arrow": arrow,
    "xlora": xlora,
    "anyssr": partial(routed, name="anyssr", build=analytic_model),
    "lorauter": partial(routed, name="lorauter", build=nearest_model),
}


def _separate_adapter(bench: Bench, domain: Domain) -> Adapter:
    return train_adapter(bench, domain.training_examples(), name=domain.name)


def _step(domain: Domain, adapters: Sequence[Adapter], model_for: Callable[[str], Scored]) -> Step:
    return Step(
        name=domain.name,
        model_for=model_for,
        trained_parameters=sum(adapter.parameters for adapter in adapters),
        seconds=sum(adapter.seconds for adapter in adapters),
        steps=sum(adapter.steps for adapter in adapters),
    )


def _sample(examples: list[Example], fraction: float) -> list[Example]:
    """Return a fixed fraction of the examples: those with the smallest digests."""
    return sorted(examples, key=Example.digest)[: round(fraction * len(examples))]
