"""Token evidence: naive Bayes over tokens and pairs of tokens, as a sparse table.

    evidence(kind, slot)  =  log P(kind | slot) - log P(kind | background)

of each kind (a token, or a hashed pair of a token and the one before it), where the counts of each slot are smoothed
towards the background, the mean of all slots' distributions. A kind that a slot has never seen has the same evidence,
log `SMOOTHING`, whatever the kind. Only differences between slots matter, so that constant is left out, and the rest is
stored only where a slot has counts: memory follows what the packs say, not the size of the vocabulary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

SMOOTHING = 0.3  # share of the background in each slot; pseudo-counts would favour slots with little text
REQUEST_SHARE = 0.1  # of everyday requests in each slot: how people ask is no sign of a field
UNIFORM_SHARE = 0.02  # of the background, so that no token is impossible

Table = dict[str, Tensor]  # starts, columns, values: the rows of a sparse matrix of kinds and slots


def token_evidence(slots: Sequence[Int64[Tensor, " kinds"]]) -> Float[Tensor, "kinds slots"]:
    """Return the evidence of all kinds from counts, dense and in float64, above that of unseen kinds."""
    shares = [_share(counts, counts) for counts in slots]
    background = _background(shares, [torch.arange(len(slots[0]))] * len(slots), len(slots[0]))
    return torch.stack([_above_unseen(share, background) for share in shares], dim=1)


def sparse_evidence(
    groups: Sequence[Sequence[Int64[Tensor, " _"]]],
    *,
    scale: float,
    requests: Sequence[Int64[Tensor, " _"]] | None = None,
) -> Table:
    """Return the evidence of several groups of kinds, one after the other, as one sparse table; its last row is empty.

    Args:
        groups: For tokens and for pairs, the counts of each slot.
        scale: Factor of all evidence.
        requests: For tokens and for pairs, the counts of everyday requests. Each slot's text is taken to have a share
            of them.
    """
    sizes = [len(group[0]) for group in groups]
    lengths = torch.zeros(sum(sizes) + 1, dtype=torch.int64)
    entries: list[tuple[int, Tensor, Tensor]] = []  # slot, kinds, values
    first = 0
    for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        if requests is None:
            kinds = [counts.nonzero().flatten() for counts in group]
            shares = [_share(counts[seen], counts) for counts, seen in zip(group, kinds, strict=True)]
        else:
            common = REQUEST_SHARE * _share(requests[number], requests[number])
            whole = [torch.add(common, _share(counts, counts), alpha=1 - REQUEST_SHARE) for counts in group]
            kinds = [share.nonzero().flatten() for share in whole]
            shares = [share[seen] for share, seen in zip(whole, kinds, strict=True)]
        background = _background(shares, kinds, size)
        for slot, (seen, share) in enumerate(zip(kinds, shares, strict=True)):
            values = (scale * _above_unseen(share, background[seen])).float()
            entries.append((slot, seen + first, values))
            lengths[seen + first] += 1
        first += size
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    places = starts[:-1].clone()
    count = max(int(starts[-1]), 1)  # without any text, one that no row has: a look-up reads something
    columns = torch.zeros(count, dtype=torch.uint8 if len(groups[0]) < 256 else torch.int16)
    values = torch.zeros(count)
    for slot, kinds, found in entries:
        where = places[kinds]
        columns[where] = slot
        values[where] = found
        places[kinds] = where + 1
    return {"starts": starts.to(torch.int32), "columns": columns, "values": values}


def look_up(
    table: Table, kinds: Int64[Tensor, "*positions kinds"], *, slots: int, most: int
) -> Float[Tensor, "*positions slots"]:
    """Return the sum of the evidence of several kinds at each position.

    Shapes do not depend on values: nothing is read back from a device, and a graph is not broken.

    Args:
        table: Result of `sparse_evidence`.
        kinds: Rows of the table.
        slots: Number of slots.
        most: The largest number of entries of a row.
    """
    start = table["starts"][kinds]
    place = start[..., None] + torch.arange(most, device=kinds.device, dtype=start.dtype)
    is_entry = place < table["starts"][kinds + 1][..., None]
    place = torch.where(is_entry, place, 0)
    columns = torch.where(is_entry, table["columns"][place].long(), slots)  # one more, for what is no entry
    found = torch.zeros(*kinds.shape[:-1], slots + 1, device=kinds.device)
    found.scatter_add_(-1, columns.flatten(-2), table["values"][place].flatten(-2))
    return found[..., :slots]


def expected_evidence(
    table: Table, shares: Float[Tensor, " kinds"], *, first: int, slots: int
) -> Float[Tensor, " slots"]:
    """Return the mean evidence of kinds that occur with these shares, from row `first` on."""
    starts = table["starts"][first : first + len(shares) + 1].long()
    begin, end = int(starts[0]), int(starts[-1])
    weights = shares.to(starts.device).repeat_interleave(starts.diff())
    found = torch.zeros(slots, dtype=weights.dtype, device=starts.device)
    return found.index_add_(0, table["columns"][begin:end].long(), weights * table["values"][begin:end])


def _share(part: Int64[Tensor, " some"], counts: Int64[Tensor, " kinds"]) -> Float[Tensor, " some"]:
    return part.double() / counts.sum().clamp(min=1)


def _background(
    shares: Sequence[Float[Tensor, " _"]], kinds: Sequence[Int64[Tensor, " _"]], size: int
) -> Float[Tensor, " kinds"]:
    mean = torch.zeros(size, dtype=torch.float64)
    for share, seen in zip(shares, kinds, strict=True):
        mean.index_add_(0, seen, share, alpha=1 / len(shares))
    return (1 - UNIFORM_SHARE) * mean + UNIFORM_SHARE / size


def _above_unseen(share: Float[Tensor, " kinds"], background: Float[Tensor, " kinds"]) -> Float[Tensor, " kinds"]:
    """Return log((1 - S) share + S background) - log background - log S."""
    return torch.log1p((1 - SMOOTHING) / SMOOTHING * share / background)
