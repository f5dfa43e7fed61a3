"""The methods that lorary is compared with, on real PEFT adapters.

    separate     one adapter for each domain, and an oracle that picks the right one: no forgetting by construction
    sequential   one adapter, trained on one domain after the other
    joint        one adapter as large as all of the stream's together, trained on all domains at once, all steps
    olora        a new adapter for each domain on top of the frozen earlier ones, its A kept orthogonal to theirs
                 (O-LoRA, Wang et al. 2023, arXiv:2310.14152)
    replay       sequential, with 5 % of each earlier domain's rows mixed into the data
    arrow        PEFT's Arrow over the separate adapters (Ostapenko et al. 2024, arXiv:2405.11157): nothing is trained
    xlora        PEFT's X-LoRA over the separate adapters (Buehler and Buehler 2024, arXiv:2402.07148): its classifier
                 is trained on 5 % of each domain's rows for as many steps as a domain has

Methods share what they have in common: the first step of four of them is the same adapter.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from method import Bench, Scored, Step, digest
from peft_adapters import Adapter, arrow_model, train_adapter, train_xlora, with_adapters, xlora_model
from streams import Domain

from lorary.domains.data.example import Example

REPLAYED = 0.05  # share of an earlier domain's rows


def separate(bench: Bench) -> Iterator[Step]:
    """One adapter for each domain; the oracle answers general text with the bare base."""
    known: dict[str, Scored] = {}
    for domain in bench.domains:
        adapter = _separate_adapter(bench, domain)
        known[domain.name] = Scored(adapter.id, partial(with_adapters, bench, [adapter]))
        choice = dict(known)
        yield _step(domain, [adapter], lambda column, choice=choice: choice.get(column, bench.base_scored))


def sequential(bench: Bench, *, replayed: float = 0.0) -> Iterator[Step]:
    """One adapter trained on after the other domain, with a share of the earlier domains' rows."""
    adapter, memory = None, []
    for domain in bench.domains:
        examples = domain.training_examples()
        adapter = train_adapter(bench, examples + memory, parent=adapter, name=domain.name)
        memory = memory + _sample(examples, replayed)
        scored = Scored(adapter.id, partial(with_adapters, bench, [adapter]))
        yield _step(domain, [adapter], lambda _column, scored=scored: scored)


def joint(bench: Bench) -> Iterator[Step]:
    """One adapter with the parameters and the steps of all domains together; only the last step exists."""
    examples = [example for domain in bench.domains for example in domain.training_examples()]
    adapter = train_adapter(bench, examples, times=len(bench.domains), name="joint")
    scored = Scored(adapter.id, partial(with_adapters, bench, [adapter]))
    yield _step(bench.domains[-1], [adapter], lambda _column: scored)


def olora(bench: Bench) -> Iterator[Step]:
    """The sum of all adapters so far, each trained on top of the earlier ones and orthogonal to them."""
    adapters: list[Adapter] = []
    for domain in bench.domains:
        examples = domain.training_examples()
        adapters.append(train_adapter(bench, examples, frozen=tuple(adapters), name=domain.name))
        scored = Scored("olora-" + digest([a.id for a in adapters]), partial(with_adapters, bench, list(adapters)))
        yield _step(domain, [adapters[-1]], lambda _column, scored=scored: scored)


def arrow(bench: Bench) -> Iterator[Step]:
    """Arrow's routing by token over the separate adapters, with PEFT's own settings."""
    adapters: list[Adapter] = []
    for domain in bench.domains:
        adapters.append(_separate_adapter(bench, domain))
        scored = Scored("arrow-" + digest([a.id for a in adapters]), partial(arrow_model, bench, list(adapters)))
        yield _step(domain, [adapters[-1]], lambda _column, scored=scored: scored)


def xlora(bench: Bench) -> Iterator[Step]:
    """X-LoRA's classifier over the separate adapters, trained once, after the last one: only the last step exists."""
    adapters = [_separate_adapter(bench, domain) for domain in bench.domains]
    examples = [e for domain in bench.domains for e in _sample(domain.training_examples(), REPLAYED)]
    router = train_xlora(bench, adapters, examples)
    scored = Scored(router.id, partial(xlora_model, bench, adapters, router))
    step = _step(bench.domains[-1], [*adapters, router], lambda _column: scored)
    step.notes["router"] = {"parameters": router.parameters, "steps": router.steps, "rows": len(examples)}
    yield step


METHODS: dict[str, Callable[[Bench], Iterator[Step]]] = {
    "separate": separate,
    "sequential": sequential,
    "joint": joint,
    "olora": olora,
    "replay": partial(sequential, replayed=REPLAYED),
    "arrow": arrow,
    "xlora": xlora,
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


def _sample(examples: list[Example], share: float) -> list[Example]:
    """A fixed share of the examples: those with the smallest digests."""
    return sorted(examples, key=Example.digest)[: round(share * len(examples))]
