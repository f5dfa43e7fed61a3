"""StackedComposition: the frozen experts of a composition in the tensor layout of the fused layer.

A composition of frozen banks can be saved in this form, a few tensors for each decoder layer in their final dtype and
order, so that composing it again only reads a file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from ..bank import LayerExperts


@dataclass(frozen=True, kw_only=True)
class StackedGroup:
    """The frozen experts of target modules that read the same input."""

    targets: tuple[str, ...]  # paths inside the decoder layer
    ranks: tuple[int, ...]  # frozen ranks of each target
    A: Float[Tensor, "columns d_in"]  # of all targets, stacked by row
    Bt: tuple[Float[Tensor, "_ _"], ...]  # by target: (its ranks, its d_out), scales folded in
    columns: Int[Tensor, " all_columns"] | None  # gate index of each column, new ranks included; None: all, in order


@dataclass(frozen=True, kw_only=True)
class StackedLayer:
    """Experts and gates of one decoder layer."""

    groups: tuple[StackedGroup, ...]
    slot_of_rank: tuple[int, ...]
    gates: Mapping[str, Tensor]  # keywords of LayerGates
    new: LayerExperts | None = None  # trainable experts, on the last ranks


@dataclass(frozen=True, kw_only=True)
class StackedComposition:
    """Composition of frozen banks, read from a file; `attach` takes it in place of a Stack."""

    names: tuple[str, ...]
    static: bool
    stacked: Mapping[int, StackedLayer]
    trainable: bool = False

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that carry experts."""
        return tuple(sorted(self.stacked))

    def layer(self, index: int, dtype: object) -> StackedLayer:
        """Return one decoder layer in the dtype in which it was saved; `dtype` is ignored."""
        return self.stacked[index]

    def to_tensors(self) -> tuple[dict[str, Tensor], str]:
        """Return the tensors by name, and a JSON description of the rest."""
        tensors, layers = {}, {}
        for index, layer in self.stacked.items():
            described = []
            for number, group in enumerate(layer.groups):
                place = f"{index}.{number}"
                tensors[f"{place}.A"] = group.A
                tensors |= {f"{place}.Bt{i}": Bt for i, Bt in enumerate(group.Bt)}
                if group.columns is not None:
                    tensors[f"{place}.columns"] = group.columns
                described.append({"targets": group.targets, "ranks": group.ranks})
            tensors |= {f"{index}.gates.{name}": tensor for name, tensor in layer.gates.items()}
            layers[str(index)] = {"groups": described, "slot_of_rank": layer.slot_of_rank, "gates": list(layer.gates)}
        return tensors, json.dumps({"names": self.names, "static": self.static, "layers": layers})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], described: str) -> "StackedComposition":
        """Rebuild a composition from the result of `to_tensors`.

        Raises:
            KeyError, TypeError, ValueError: If the tensors do not match the description.
        """
        document = json.loads(described)
        return cls(
            names=tuple(document["names"]),
            static=document["static"],
            stacked={int(index): _layer(tensors, index, layer) for index, layer in document["layers"].items()},
        )


def _layer(tensors: Mapping[str, Tensor], index: str, described: dict) -> StackedLayer:
    return StackedLayer(
        groups=tuple(
            StackedGroup(
                targets=tuple(group["targets"]),
                ranks=tuple(group["ranks"]),
                A=tensors[f"{index}.{number}.A"],
                Bt=tuple(tensors[f"{index}.{number}.Bt{i}"] for i in range(len(group["targets"]))),
                columns=tensors.get(f"{index}.{number}.columns"),
            )
            for number, group in enumerate(described["groups"])
        ),
        slot_of_rank=tuple(described["slot_of_rank"]),
        gates={name: tensors[f"{index}.gates.{name}"] for name in described["gates"]},
    )
