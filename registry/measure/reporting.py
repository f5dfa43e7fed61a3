"""From a registry to its report: which domains, in which order, on which held-out data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...adapters.composition import GENERAL, parse_reference
from ...domains.errors import InputError
from ...domains.progress import OnProgress, silent
from ..base.load import LoadedBase
from ..store.manifest import BaseRecord
from ..store.store import Store
from .held_out import MAX_SCORED_BYTES, general_text, measured_on
from .report import RetentionReport
from .retention import in_order_of_addition, measure_retention


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
