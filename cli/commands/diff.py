"""`registry diff`: the differences between two versions."""

from collections import Counter
from typing import TYPE_CHECKING

from ..options import Json, Reference, StorePath
from ..show import facts, output
from ..show.numbers import brief, exact, size
from ..show.page import Block, Cell, Page, Span, Table, cell, fields, line, table
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry.maintenance.diff import VersionDiff
    from ...registry.store.manifest import PackManifest

_SCORE_NAMES = {
    "gate": "the parent's text, routed",
    "base": "own text, base",
    "alone": "own text, own experts",
    "routed": "own text, routed",
    "general_base": "general text, base",
    "general_routed": "general text, routed",
}
_STYLES = {"added": "good", "removed": "bad", "changed": "warn"}


def diff(a: Reference, b: Reference, store: StorePath = None, as_json: Json = False) -> None:
    """Compare two versions: experts, norms of their weight updates by layer, statistics, scores and files.

    |dW| is the Frobenius norm of a layer's weight update under constant gates; CHANGE is the norm of the difference.
    Scores are bits per byte, each on the held-out text of its version.

    Example: registry diff medicine@1 medicine@2
    """
    registry = open_registry(store)
    output.show(diff_page(registry.diff(a, b)), command="diff", as_json=as_json)


def diff_page(found: "VersionDiff") -> Page:
    """Make the page with both versions side by side."""
    before, after = found.versions
    names = facts.reference(before), facts.reference(after)
    sizes = [sum(file.size for file in manifest.files) for manifest in found.versions]
    parameters = [facts.parameters(manifest) for manifest in found.versions]
    rows = [
        ("experts", *(cell(_experts(manifest)) for manifest in found.versions)),
        ("parameters", *(cell(f"{number:,}", number) for number in parameters)),
        *((name, *(cell(f"{number:,}", number) for number in pair)) for name, pair in found.statistics.items()),
        ("size", *(cell(size(number), number) for number in sizes)),
        ("digest", *(cell(brief(manifest.digest), manifest.digest) for manifest in found.versions)),
    ]
    blocks: list[Block] = [
        table(("", *names), rows, right=names, no_wrap=("", *names)),
        _layer_table(found),
        _score_table(found, names),
        _file_table(found),
        fields(
            [("text similarity", cell(f"{found.feature_cosine:.4f} cosine of mean features", found.feature_cosine))]
        ),
    ]
    return Page(data=found.as_json(), blocks=tuple(block for block in blocks if not _is_empty(block)))


def _experts(manifest: "PackManifest") -> str:
    """Describe the experts by generation: `3 of rank 4 + 3 of rank 4`."""
    groups = Counter((expert.generation, expert.rank) for expert in manifest.experts)
    return " + ".join(f"{count} of rank {rank}" for (_, rank), count in sorted(groups.items()))


def _layer_table(found: "VersionDiff") -> Table:
    columns = ("LAYER", "EXPERTS", "RANKS", "|dW|", "|dW| AFTER", "CHANGE")
    rows = [
        [
            cell(str(layer.layer)),
            _pair(*layer.experts),
            _pair(*layer.ranks),
            cell(f"{layer.norms[0]:.3f}", exact(layer.norms[0])),
            cell(f"{layer.norms[1]:.3f}", exact(layer.norms[1])),
            cell(f"{layer.change:.3f}", exact(layer.change)),
        ]
        for layer in found.layers
    ]
    return table(columns, rows, right=columns, no_wrap=columns)


def _pair(before: int, after: int) -> Cell:
    text = str(before) if before == after else f"{before} -> {after}"
    return cell(text, f"{before} {after}")


def _score_table(found: "VersionDiff", names: tuple[str, str]) -> Table:
    rows = []
    for key, (before, after) in found.scores.items():
        if before is None and after is None:
            continue
        delta = None if before is None or after is None else after - before
        style = "" if delta is None or abs(delta) < 0.0005 else "good" if delta < 0 else "bad"
        shown = "-" if delta is None else f"{delta:+z.3f}"
        rows.append(
            [
                cell(_SCORE_NAMES[key]),
                facts.number(before),
                facts.number(after),
                cell(line(Span(shown, style)), exact(delta)),
            ]
        )
    columns = ("BITS/BYTE", *names, "DELTA")
    return table(columns, rows, right=columns[1:], no_wrap=columns)


def _file_table(found: "VersionDiff") -> Table:
    rows = [[cell(path), cell(Span(state, _STYLES[state]))] for path, state in found.files.items() if state != "same"]
    return table(("FILE", "STATE"), rows, no_wrap=("STATE",))


def _is_empty(block: Block) -> bool:
    return isinstance(block, Table) and not block.rows
