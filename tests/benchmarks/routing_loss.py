"""Loss of a stored composition of medicine and legal on streams that switch, by real forward passes."""

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from routing_texts import FIELDS, stream_ids, unseen_text

from lorary.adapters.layer.routing import fixed_slots
from lorary.domains.base_model import max_positions
from lorary.registry import Registry

JUDGED = 384  # tokens at the end of a stream, whose loss is taken
PAIRS = (("legal", "medicine"), ("medicine", "legal"), ("medicine", "general"), ("general", "medicine"))
BEFORE = 256  # tokens of another field
START = 128  # tokens of a text before the judged ones, if there is no other before them
LONG = 2048  # tokens of a long document


def measure_loss(store: Path, data: Path, *, streams: int) -> list[dict[str, Any]]:
    """Return the mean loss of each kind of stream: routed, with the right slot alone, and of the bare base."""
    registry = Registry.open(store)
    model = registry.compose("medicine+legal")
    base = registry.base
    texts = {field: unseen_text(data, field) for field in FIELDS}
    longest = max_positions(base.model) or LONG
    kinds: dict[str, tuple[str, int, str, int]] = {
        f"{field} from the start": (field, 0, field, START + JUDGED) for field in FIELDS
    }
    kinds |= {f"{BEFORE} {earlier}, then {field}": (earlier, BEFORE, field, JUDGED) for earlier, field in PAIRS}
    kinds |= {f"{field}, {min(LONG, longest)} tokens": (field, 0, field, min(LONG, longest)) for field in FIELDS}
    rows = []
    for kind, (earlier, before, field, after) in kinds.items():
        found = []
        for i in range(streams):
            ids = stream_ids(base, texts[earlier], before, streams + i) + stream_ids(base, texts[field], after, i)
            inputs = torch.tensor([ids[:longest]])
            routed = _nats(model, inputs)
            with fixed_slots(model, {field: 1.0}):
                found.append((routed, _nats(model, inputs), _nats(base.model, inputs)))
        means = [fmean(column) for column in zip(*found, strict=True)]
        rows.append({"stream": kind, "streams": streams, "routed": means[0], "right slot": means[1], "base": means[2]})
    return rows


@torch.inference_mode()
def _nats(model: Any, ids: torch.Tensor) -> float:
    """Return the mean loss of the last tokens of a stream."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return F.cross_entropy(logits[0, -JUDGED - 1 : -1].float(), ids[0, -JUDGED:]).item()
