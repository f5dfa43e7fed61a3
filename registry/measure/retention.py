"""Measure the retention matrix: every domain's held-out data after every step of adding a domain.

    R[i][j] = score on domain j after step i        step 0 = the bare base, step 1 = KP, then the domains as added

Row i is the routed composition of KP and all domains added up to step i. Only cells that enter a metric are measured:
the rows of the base and of KP, and each column from the step before its domain was learned. Each cell is cached in the
store as soon as it is measured, so an interrupted report resumes, and a report after one more domain measures only that
domain's row and the beginning of its column.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

from transformers import PreTrainedModel

from ...adapters.composition import GENERAL, parse_reference
from ...adapters.layer.routing import fixed_slots
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
from .held_out import MAX_SCORED_BYTES, HeldOut, find_held_out, general_text
from .report import RetentionReport, RetentionScores
from .scores import CellScores, ScoreCache

SCORER: Final = 3  # part of every key: increment when scoring gives other values under the same gates
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
    """Measure how each domain's scores change with each step, and return the report.

    Args:
        base: Returns the base model; not called if all cells are cached.
        record: Fingerprint of the base model.
        domains: References in the order of addition. By default the latest version of every domain, in the order in
            which they were added; domains whose data is not on this machine are left out, and the report lists them.
        machine: Device and dtype, which scores depend on.
        questions: Also score questions with choices.
        max_bytes: Maximum number of bytes of text per domain.

    Raises:
        InputError: There is no domain, one is named twice, or the data of a named domain (or of all) is not on this
            machine.
        NotFoundError: There is no such domain or version.
    """
    limit = max_bytes or MAX_SCORED_BYTES
    if domains:
        chosen = [store.manifest(*parse_reference(reference)) for reference in domains]
    else:
        latest = [store.manifest(name) for name in store.domains() if name != GENERAL]
        chosen = sort_by_addition(store, latest)
    data, left_out = {GENERAL: general_text(max_bytes=limit)}, {}
    for manifest in chosen:
        try:
            data[manifest.name] = find_held_out(store, manifest, max_bytes=limit, with_questions=questions)
        except InputError as error:
            if domains:
                raise
            left_out[manifest.name] = error.message
    added = [manifest for manifest in chosen if manifest.name in data]
    if chosen and not added:
        raise InputError(
            "No domain can be measured: no held-out text is available.",
            cause="; ".join(left_out.values()),
            fix=f"evaluate a domain on your own text: registry evaluate {chosen[0].name} --data FILE",
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


def sort_by_addition(store: Store, manifests: Sequence[PackManifest]) -> list[PackManifest]:
    """Return the domains, without KP, in the order in which they were first added."""
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
    """Return the scores of all cells; those that are not cached are measured.

    Args:
        base: Returns the base model; not called if all cells are cached.
        record: Fingerprint of the base model.
        added: Versions in the order of addition, without KP.
        data: Held-out data by domain, including `general`.
        machine: Device and dtype, which scores depend on.

    Raises:
        InputError: A domain is named twice, or there is none.
    """
    _check_names(added)
    kp = _plan(store, record, [])
    plans = [None, kp, *(_plan(store, record, added[:i]) for i in range(1, len(added) + 1))]
    steps = (BASE_STEP, GENERAL, *(manifest.name for manifest in added))
    columns = tuple(data[name] for name in steps[1:])
    places = measured_cells(len(added))
    routed = [_Cell(plans[i], columns[j], after=steps[i]) for i, j in places]
    own = [_Cell(_plan(store, record, [m]), data[m.name], after="its own experts", alone=m) for m in added]
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
    """Return the cells (step, column) to measure for a number of domains, row by row; column 0 is general text."""
    last = added + 1
    return [(i, j) for i in range(last + 1) for j in range(added + 1) if i <= 1 or i >= j]  # j is learned at step j + 1


@dataclass(frozen=True)
class _Cell:
    """One cell to measure: the data, and the model."""

    plan: Plan | None  # None is the bare base
    data: HeldOut
    after: str  # the step, for progress reports
    alone: PackManifest | None = None  # measure under this domain's experts alone, slot gate 1

    @property
    def key(self) -> dict[str, Any]:
        """The part of the cache key that differs between cells."""
        if self.plan is None:
            model: object = BASE_STEP
        elif self.alone is not None:
            model = {"alone": self.alone.digest}
        else:
            model = [[slot.name, slot.manifest.digest, slot.prior] for slot in self.plan.slots]
        return {"model": model, "data": self.data.digest}


class _Composer:
    """Models by plan, with the packs and the latest model kept in memory."""

    def __init__(self, store: Store, base: Callable[[], LoadedBase]):
        self._store = store
        self._packs: dict[str, DomainPack] = {}
        self._latest: tuple[Plan, PreTrainedModel] | None = None
        self.base = base

    def pack(self, manifest: PackManifest) -> DomainPack:
        """Return a pack; each is read once."""
        if manifest.digest not in self._packs:
            self._packs[manifest.digest] = read_pack(self._store, manifest)
        return self._packs[manifest.digest]

    def routing(self, manifest: PackManifest) -> Routable:
        """Return the part of a pack that routing needs, without reading its experts."""
        return self._packs.get(manifest.digest) or read_routing(self._store, manifest)

    def model(self, plan: Plan | None) -> PreTrainedModel:
        """Return the bare base, or the routed composition of a plan."""
        if plan is None:
            return self.base().model
        if self._latest is None or self._latest[0] != plan:
            self._latest = None  # frees the old model before the new one is built
            self._latest = plan, compose_packs(plan, [self.pack(slot.manifest) for slot in plan.slots], self.base())
        return self._latest[1]


def _measure_all(
    cells: Sequence[_Cell], cache: ScoreCache, composer: _Composer, on_progress: OnProgress
) -> list[CellScores]:
    """Return the scores of each cell, from the cache, or measured and cached at once."""
    found = [cache.get(cell.key) for cell in cells]
    missing = [i for i, scores in enumerate(found) if scores is None]
    for number, i in enumerate(missing, start=1):
        cell = cells[i]
        stage = f"{number} of {len(missing)}: {cell.data.name} after {cell.after}"
        model = composer.model(cell.plan)
        with fixed_slots(model, {cell.alone.name: 1.0}) if cell.alone else nullcontext():
            scores = score_held_out(model, composer.base(), cell.data, stage=stage, on_progress=on_progress)
        cache.put(cell.key, scores)
        found[i] = scores
    return [scores for scores in found if scores is not None]


def _plan(store: Store, record: BaseRecord, domains: Sequence[PackManifest]) -> Plan:
    """Return the plan of the routed composition of KP and these versions."""
    terms = [GENERAL, *(f"{manifest.name}@{manifest.version}" for manifest in domains)]
    return plan_composition(store, "+".join(terms), base=record)


def _drifts(composer: _Composer, preservation: PackManifest, added: Sequence[PackManifest]) -> Iterator[Drift]:
    """Yield the routing drift that each addition causes for the domains before it."""
    kp = composer.pack(preservation)
    width = kp.bank.layers[kp.bank.first_layer].expert_gate.shape[1]
    routing = {manifest.name: composer.routing(manifest) for manifest in added}
    for i, manifest in enumerate(added):
        others = {older.name: routing[older.name] for older in added[:i]}
        yield measure_drift(kp, others, routing[manifest.name], width=width)


def _first_created(store: Store, name: str) -> str:
    return min(manifest.created for manifest in store.history(name))


def _check_names(added: Sequence[PackManifest]) -> None:
    names = [manifest.name for manifest in added]
    if not names:
        raise InputError(
            "There is no domain to measure.",
            cause="the registry has only its KP bank",
            fix="add a domain: registry add-domain medicine",
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or GENERAL in names:
        raise InputError(
            f"{', '.join(repeated) or GENERAL} cannot be among the domains{' twice' if repeated else ''}.",
            cause=f"asked for {', '.join(names)}; general is the KP slot, which is always measured",
            fix="name each domain once: registry report --domains medicine,legal",
        )
