"""Tokens that a text has once: kept on this machine, and in no pack.

A pack may be published, so it leaves out what could identify a text (docs/threat-model.md). A domain that is retrained
again and again on little text would then never learn a rare term: so the run that stored a version keeps the tokens
that the pack left out, and they are added to the next version's counts.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...domains.errors import IntegrityError
from ...domains.statistics.statistics import DomainStatistics
from ..pack.tensor_file import load_tensors, save_tensors
from ..store.manifest import PackManifest
from ..store.seals import write_sealed
from ..store.store import Store

RARE_FILE = "rare.safetensors"


def keep_rare_tokens(folder: Path, statistics: DomainStatistics) -> None:
    """Write the tokens and pairs that `without_rare_tokens` leaves out to a run's folder."""
    kept = statistics.without_rare_tokens()
    tensors = {}
    for name in ("token_counts", "pair_counts"):
        left_out = getattr(statistics, name) - getattr(kept, name)
        ids = left_out.nonzero().flatten()
        tensors |= {f"{name}.ids": ids.to(torch.int32), f"{name}.values": left_out[ids]}
    write_sealed(folder / RARE_FILE, save_tensors(tensors))


def with_rare_tokens(store: Store, manifest: PackManifest, statistics: DomainStatistics) -> DomainStatistics:
    """Return the statistics of a version with the tokens that its pack left out, if it was made on this machine.

    Raises:
        IntegrityError: The file that keeps them is damaged.
    """
    path = store.runs / Path(str(manifest.train.get("run"))).name / RARE_FILE
    if not path.is_file():
        return statistics
    try:
        tensors = load_tensors(path.read_bytes(), source=str(path))
        counts = {
            name: _added(getattr(statistics, name), tensors[f"{name}.ids"], tensors[f"{name}.values"])
            for name in ("token_counts", "pair_counts")
        }
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise IntegrityError(
            f"{path} is damaged.", cause=str(error), fix="delete it: rare tokens of this version are then not counted"
        ) from error
    return statistics.with_counts(**counts)


def _added(counts: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    if ids.shape != values.shape or (values < 0).any():
        raise ValueError(f"{len(ids)} ids and {len(values)} counts")
    return counts.index_add(0, ids.long(), values.long())
