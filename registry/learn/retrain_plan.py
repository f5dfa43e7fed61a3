"""Plan a retraining: parent, new text, shape of the new experts. Nothing heavy is loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from ...adapters.composition import GENERAL
from ...adapters.config import BankConfig
from ...domains.data.corpus import Source
from ...domains.data.documents import rows_apart
from ...domains.data.example import Example
from ...domains.data.spec import DomainSpec
from ...domains.errors import InputError
from ..measure.held_out import (
    FRESH,
    UNKNOWN_LICENSE,
    DomainData,
    read_checked,
    read_domain_data,
    stored_held_out,
    without_duplicates,
)
from ..store.manifest import PackManifest
from ..store.store import Store

MODES: Final = ("extend", "continue", FRESH)
TOLERANCE: Final = 0.005  # share by which bits per byte may rise on the parent's held-out text (docs/log.md)


@dataclass(frozen=True, kw_only=True)
class RetrainingPlan:
    """A checked retraining, ready to run."""

    parent: PackManifest
    spec: DomainSpec
    mode: str
    bank: BankConfig  # of the experts that are trained
    data: DomainData  # its held-out set includes the parent's
    older: list[Example]  # text of the acceptance check
    tolerance: float


def plan_retraining(
    store: Store,
    parent: PackManifest,
    data: Sequence[Source],
    *,
    raw: bool = False,
    mode: str = "extend",
    bank: Mapping[str, Any] | None = None,
    gate_data: Sequence[Source] = (),
    tolerance: float | None = None,
) -> RetrainingPlan:
    """Read and check everything that a retraining needs.

    Args:
        raw: Whether prompts and completions of the new text are read without the base's chat template.
        bank: Fields of `BankConfig` in which the new experts differ from the parent's.
        gate_data: Text for the acceptance check, instead of the parent's held-out text.
        tolerance: Share by which bits per byte may rise on that text; None means the default.

    Raises:
        CorpusError: A row cannot be used.
        InputError: A setting is off, there is no new text or too little, or the parent's held-out text cannot be had.
    """
    name = parent.name
    tolerance = TOLERANCE if tolerance is None else tolerance
    _check(parent, mode=mode, has_data=bool(data), has_bank=bool(bank), tolerance=tolerance)
    config = _bank_config(parent, bank or {})
    spec = DomainSpec(name=name, description=parent.description, license=UNKNOWN_LICENSE)
    found = read_domain_data(spec, data, raw=raw)
    older = read_checked(gate_data, raw=raw) if gate_data else _held_out_of(store, parent)
    train = rows_apart(found.train, older)
    if not train:
        raise InputError(
            f"Every row of the new data of {name!r} is held out.",
            cause="what a version is judged by is never trained on, nor are other rows of its documents",
            fix="give rows that the parent did not hold out",
        )
    held_out = found.held_out if mode == FRESH else without_duplicates(older, found.held_out)
    return RetrainingPlan(
        parent=parent,
        spec=spec,
        mode=mode,
        bank=config,
        data=replace(found, train=train, held_out=held_out),
        older=older,
        tolerance=tolerance,
    )


def _check(parent: PackManifest, *, mode: str, has_data: bool, has_bank: bool, tolerance: float) -> None:
    name = parent.name
    if name == GENERAL:
        raise InputError(
            "The KP bank is never retrained.",
            cause="every domain of the registry was trained over it",
            fix="add what is new as a domain: registry add-domain NAME --data FILE",
        )
    if not parent.is_routed:
        raise InputError(
            f"{name}@{parent.version} was imported without text, so there is nothing to judge a new version by.",
            fix=f"import it under another name, with text: registry import OTHER-{name} ADAPTER --data FILE",
        )
    if not has_data:
        fix = f"give the new text: registry retrain {name} --data FILE"
        raise InputError(f"There is nothing new to train {name!r} on.", fix=fix)
    if mode not in MODES:
        raise InputError(f"There is no mode {mode!r}.", fix=f"choose among: {', '.join(MODES)}")
    if mode == "continue" and has_bank:
        cause = "the mode continue trains the parent's experts further, as they are"
        raise InputError("The shape of the experts cannot be chosen.", cause=cause, fix="use --mode extend or fresh")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"The tolerance must be 0 or more, found {tolerance}.", fix="for example --tolerance 0.01")


def _bank_config(parent: PackManifest, changes: Mapping[str, Any]) -> BankConfig:
    """Return the settings of the parent's newest experts with some changes, for the same target modules."""
    usual, told = asdict(BankConfig()), parent.train.get("bank") or {}
    if not isinstance(changes, Mapping) or changes.keys() - usual.keys():
        raise InputError(
            "bank must name fields of BankConfig.",
            cause=f"found {changes!r}"[:200],
            fix=f"for example bank={{'rank': 8}}; the fields are {', '.join(usual)}",
        )
    saved = usual | {key: told[key] for key in usual.keys() & told.keys()}
    last = parent.experts[-1]
    targets = tuple(sorted({target for expert in parent.experts for target in expert.targets}))
    shape = {"rank": last.rank, "alpha": last.alpha, "method": last.method, "targets": targets}
    if "rank" in changes and "alpha" not in changes:  # the same scale
        shape["alpha"] = last.alpha * changes["rank"] / last.rank
    return BankConfig(**(saved | shape | dict(changes)))


def _held_out_of(store: Store, parent: PackManifest) -> list[Example]:
    try:
        return stored_held_out(store, parent)
    except InputError as error:
        error.fix = (
            f"say what the new version is judged by: registry retrain {parent.name} --gate-data FILE --data FILE"
        )
        raise
