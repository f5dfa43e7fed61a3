"""Measures the cells of the retention matrix: every domain's held-out data after every step.

    R[i][j] = score on domain j after step i        step 0 = the bare base, step 1 = KP, then the domains as added

Row i is the routed composition of KP and everything that was added up to step i. Measured are the base's row, KP's row,
and of each column the step before its domain was learned and every step from then on: nothing else enters a metric. A
report after one more domain measures that domain's row and the beginning of its column, and nothing again. Each cell is
kept in the store's cache as soon as it is measured, so an interrupted report goes on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

from transformers import PreTrainedModel

from ...adapters.composition import GENERAL, parse_reference
from ...adapters.layer.attach import fixed_slots
from ...adapters.router.router import METHOD
from ...domains.errors import InputError
from ...domains.progress import OnProgress, silent
from ..base.load import LoadedBase
from ..compose.build import compose_packs
from ..compose.drift import Drift, measure_drift
from ..compose.plan import Plan, plan_composition
from ..pack.pack import DomainPack, Routable, read_pack, read_routing
from ..store.manifest import BaseRecord, PackManifest
from ..store.store import Store
from .evaluate import BLOCK, score_held_out
from .held_out import MAX_SCORED_BYTES, HeldOut, general_text, measured_on
from .report import RetentionReport, RetentionScores
from .scores import CellScores, ScoreCache

SCORER: Final = 3  # part of every key: raised when scores come out differently under the same gates
BASE_STEP: Final = "base"


def report_retention(
    store: Store,
    base: Callable[[], LoadedBase],
    record: BaseRecord,
    domains: Sequence[str] = (),
    *,
    machine: Mapping[str, Any],
    questions: bool = True,
    max_bytes: int | None = None,
    on_progress: OnProgress = silent,
) -> RetentionReport:
    """Measures what became of each domain after each step.

    Args:
        base: Gives the base model; not called if everything was measured before.
        domains: References, in the order in which they count as added. If none are named: the latest version of every
            domain, as added; those whose data is not on this machine are left out, and the report says so.
        machine: What else scores depend on: device and number format.
        questions: Whether questions with choices are answered too.
        max_bytes: At most so much text of each domain.

    Raises:
        InputError: There is no domain, one is named twice, or data is not on this machine: of a named one, or of all.
        NotFoundError: There is no such domain or version.
    """
    limit = max_bytes or MAX_SCORED_BYTES
    if domains:
        chosen = [store.manifest(*parse_reference(reference)) for reference in domains]
    else:
        latest = [store.manifest(name) for name in store.domains() if name != GENERAL]
        chosen = in_order_of_addition(store, latest)
    data, left_out = {GENERAL: general_text(max_bytes=limit)}, {}
    for manifest in chosen:
        try:
            data[manifest.name] = measured_on(store, manifest, max_bytes=limit, with_questions=questions)
        except InputError as error:
            if domains:
                raise
            left_out[manifest.name] = error.message
    added = [manifest for manifest in chosen if manifest.name in data]
    if chosen and not added:
        raise InputError(
            "No domain can be measured: the held-out text of none is to be had.",
            cause="; ".join(left_out.values()),
            fix=f"measure one on text of your own: registry evaluate {chosen[0].name} --data FILE",
        )
    scores = measure_retention(
        store,
        base,
        record,
        added=added,
        data=data,
        machine=machine,
        on_progress=on_progress,
    )
    return RetentionReport(scores, left_out=left_out)


def in_order_of_addition(store: Store, manifests: Sequence[PackManifest]) -> list[PackManifest]:
    """The domains in the order in which they were first added; KP's bank is left out."""
    return sorted(
        (manifest for manifest in manifests if manifest.name != GENERAL),
        key=lambda manifest: (_first_created(store, manifest.name), manifest.name),
    )


def measure_retention(
    store: Store,
    base: Callable[[], LoadedBase],
    record: BaseRecord,
    *,
    added: Sequence[PackManifest],
    data: Mapping[str, HeldOut],
    machine: Mapping[str, Any],
    on_progress: OnProgress,
) -> RetentionScores:
    """Measures what the cache does not have.

    Args:
        base: Gives the base model; not called if everything was measured before.
        added: Versions in the order in which they count as added, without KP.
        data: Held-out data by domain; `general` among them.
        machine: What else scores depend on: device and number format.

    Raises:
        InputError: A domain is named twice, or none is.
    """
    _check(added)
    kp = _plan(store, record, [])
    plans = [None, kp, *(_plan(store, record, added[:i]) for i in range(1, len(added) + 1))]
    steps = (BASE_STEP, GENERAL, *(manifest.name for manifest in added))
    columns = tuple(data[name] for name in steps[1:])
    places = measured_cells(len(added))
    routed = [_Wanted(plans[i], columns[j], after=steps[i]) for i, j in places]
    own = [_Wanted(_plan(store, record, [m]), data[m.name], after="its own experts", alone=m) for m in added]
    shared = {
        "scorer": SCORER,
        "router": METHOD,
        "programs": {name: version(name) for name in ("lorary", "torch", "transformers")},
        "base": [record.architecture, record.weights, record.tokenizer],
        "block": BLOCK,
        **machine,
    }
    cache = ScoreCache(store.cache / "scores", shared)
    composer = _Composer(store, base)
    found = _measure_all([*routed, *own], cache, composer, on_progress)
    cells = dict(zip(places, found[: len(places)], strict=True))
    preservation = kp.slots[0].manifest
    return RetentionScores(
        steps=steps,
        manifests=(preservation, *added),
        data=columns,
        cells=cells,
        alone=(cells[1, 0], *found[len(places) :]),
        drift=tuple(_drifts(composer, preservation, added)),
    )


def measured_cells(added: int) -> list[tuple[int, int]]:
    """Which cells (step, column) are measured for so many domains, row by row; column 0 is general text."""
    last = added + 1
    return [(i, j) for i in range(last + 1) for j in range(added + 1) if i <= 1 or i >= j]  # j is learned at step j + 1


@dataclass(frozen=True)
class _Wanted:
    """Scores that are needed: of which data, under which model."""

    plan: Plan | None  # None is the bare base
    data: HeldOut
    after: str  # for a person
    alone: PackManifest | None = None  # only this domain's experts, slot gate 1

    @property
    def key(self) -> dict[str, Any]:
        """What the scores depend on, besides what all scores depend on."""
        if self.plan is None:
            model: object = BASE_STEP
        elif self.alone is not None:
            model = {"alone": self.alone.digest}
        else:
            model = [[slot.name, slot.manifest.digest, slot.prior] for slot in self.plan.slots]
        return {"model": model, "data": self.data.digest}


class _Composer:
    """Gives the model of a plan; keeps the packs, and the latest model."""

    def __init__(self, store: Store, base: Callable[[], LoadedBase]):
        self._store = store
        self._packs: dict[str, DomainPack] = {}
        self._latest: tuple[Plan, PreTrainedModel] | None = None
        self.base = base

    def pack(self, manifest: PackManifest) -> DomainPack:
        """A pack, read once."""
        if manifest.digest not in self._packs:
            self._packs[manifest.digest] = read_pack(self._store, manifest)
        return self._packs[manifest.digest]

    def routing(self, manifest: PackManifest) -> Routable:
        """What a pack routes by; its experts are not read for that."""
        return self._packs.get(manifest.digest) or read_routing(self._store, manifest)

    def model(self, plan: Plan | None) -> PreTrainedModel:
        """The bare base, or the routed composition."""
        if plan is None:
            return self.base().model
        if self._latest is None or self._latest[0] != plan:
            self._latest = None  # the old one goes before the new one comes
            self._latest = plan, compose_packs(plan, [self.pack(slot.manifest) for slot in plan.slots], self.base())
        return self._latest[1]


def _measure_all(
    wanted: Sequence[_Wanted], cache: ScoreCache, composer: _Composer, on_progress: OnProgress
) -> list[CellScores]:
    """The scores of each, from the cache or measured now and kept there at once."""
    found = [cache.find(one.key) for one in wanted]
    missing = [i for i, scores in enumerate(found) if scores is None]
    for number, i in enumerate(missing, start=1):
        one = wanted[i]
        what = f"{number} of {len(missing)}: {one.data.name} after {one.after}"
        model = composer.model(one.plan)
        with fixed_slots(model, {one.alone.name: 1.0}) if one.alone else nullcontext():
            scores = score_held_out(model, composer.base(), one.data, what=what, on_progress=on_progress)
        cache.put(one.key, scores)
        found[i] = scores
    return [scores for scores in found if scores is not None]


def _plan(store: Store, record: BaseRecord, domains: Sequence[PackManifest]) -> Plan:
    """The routed composition of KP and these versions."""
    terms = [GENERAL, *(f"{manifest.name}@{manifest.version}" for manifest in domains)]
    return plan_composition(store, "+".join(terms), base=record)


def _drifts(composer: _Composer, preservation: PackManifest, added: Sequence[PackManifest]) -> Iterator[Drift]:
    """What each addition did to the routing of the domains before it."""
    kp = composer.pack(preservation)
    width = kp.bank.layers[kp.bank.first_layer].expert_gate.shape[1]
    routing = {manifest.name: composer.routing(manifest) for manifest in added}
    for i, manifest in enumerate(added):
        others = {older.name: routing[older.name] for older in added[:i]}
        yield measure_drift(kp, others, routing[manifest.name], width=width)


def _first_created(store: Store, name: str) -> str:
    return min(manifest.created for manifest in store.history(name))


def _check(added: Sequence[PackManifest]) -> None:
    names = [manifest.name for manifest in added]
    if not names:
        raise InputError(
            "There is no domain whose retention could be measured.",
            cause="the registry has its KP bank only",
            fix="add one: registry add-domain medicine",
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or GENERAL in names:
        raise InputError(
            f"{', '.join(repeated) or GENERAL} cannot be among the domains{' twice' if repeated else ''}.",
            cause=f"asked for {', '.join(names)}; general is the KP slot and always there",
            fix="name each domain once: registry report --domains medicine,legal",
        )
