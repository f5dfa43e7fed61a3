"""Options that several commands share, each declared once."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from ..adapters.config import BankConfig, TrainingConfig

if TYPE_CHECKING:
    from ..domains.data.corpus import Source

_BANK, _TRAINING, _MACHINE = "The new experts", "Training", "Machine"

StorePath = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="PATH",
        help="The registry's folder. Otherwise $LORARY_STORE, the nearest .lorary above this folder, or your own.",
        show_default=False,
    ),
]
Reference = Annotated[
    str, typer.Argument(metavar="REF", help="NAME, NAME@2 or NAME@ALIAS; general is the KP bank.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON document.")]
Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="Domains joined by +, each with an optional version and weight: medicine@2:0.7+legal:0.3. "
        "A domain may be a pack on the Hub, hf://OWNER/REPO@v2. Or the folder of a saved composition.",
    ),
]
Static = Annotated[bool, typer.Option("--static", metavar="", help="Constant weights instead of routing.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="JSONL, JSON, CSV, TSV, TXT or parquet, or hf:OWNER/NAME; repeat it for several.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 or mps.", rich_help_panel=_MACHINE)]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        metavar="TYPE", help="auto, float32, bfloat16 or float16: numbers of the base model.", rich_help_panel=_MACHINE
    ),
]
NoQuestions = Annotated[bool, typer.Option("--no-questions", metavar="", help="Leave out the questions.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="At most so many tokens are written.")]


def shape_option(text: str, *names: str, **more: Any) -> Any:
    """An option that shapes new experts."""
    return typer.Option(*names, help=text, rich_help_panel=_BANK, **{"metavar": "N", **more})


def _training(text: str, default: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=_TRAINING, show_default=default, **{"metavar": "N", **more})


def sources(data: list[str] | None) -> "list[Source]":
    """What --data names: files as paths, the rest as it is."""
    return [name if name.startswith("hf:") else Path(name) for name in data or []]


@dataclass(frozen=True, kw_only=True)
class BankOptions:
    """What the new experts look like."""

    rank: Annotated[int, shape_option("Rank of each expert.", min=1)] = BankConfig.rank
    alpha: Annotated[float, shape_option("Scale of each expert: alpha / rank.")] = BankConfig.alpha
    experts: Annotated[float, shape_option("Experts a layer, on average over the layers that have any.")] = (
        BankConfig.experts
    )
    schedule: Annotated[
        Literal["linear", "quarters", "uniform", "data"],
        shape_option("How their number grows with depth; data measures it.", metavar="linear|quarters|uniform|data"),
    ] = "linear"
    targets: Annotated[
        str | None,
        shape_option("Linear modules to extend, such as q_proj,v_proj.", metavar="NAMES", show_default="all of them"),
    ] = None
    no_rank_gates: Annotated[bool, shape_option("Leave out the gate of each rank.", "--no-rank-gates", metavar="")] = (
        False
    )
    method: Annotated[
        Literal["lora", "rslora"], shape_option("Scale by alpha / rank, or alpha / sqrt(rank).", metavar="lora|rslora")
    ] = "lora"

    def config(self) -> BankConfig:
        """The same for the library."""
        names = tuple(name.strip() for name in (self.targets or "").split(",") if name.strip())
        return BankConfig(
            rank=self.rank,
            alpha=self.alpha,
            experts=self.experts,
            schedule=self.schedule,
            targets=names or None,
            rank_gates=not self.no_rank_gates,
            method=self.method,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the new experts are trained.

    None is the library's default: importing it takes seconds, so the help repeats the numbers (a test compares them).
    """

    steps: Annotated[int | None, _training("Training steps.", "as many as --epochs needs", min=1)] = None
    epochs: Annotated[float | None, _training("Passes over the data, if --steps is not given.", "4.0")] = None
    batch: Annotated[int | None, _training("Blocks a step.", "8", min=1)] = None
    block: Annotated[int | None, _training("Tokens a block.", "256", min=2)] = None
    learning_rate: Annotated[
        float | None, _training("Highest learning rate.", "2 / width of the base; for init .03 of it")
    ] = None
    seed: Annotated[int | None, _training("Same data and seed, same experts.", "0")] = None
    checkpoint_every: Annotated[
        int | None, _training("Steps between checkpoints, from which a repeated command resumes.", "50", min=1)
    ] = None

    def config(self) -> TrainingConfig:
        """The same for the library."""
        return TrainingConfig(**given_options(self))


def given_options(group: Any) -> dict[str, Any]:
    """The options of a group that were given, those that are not None, by their name in the library."""
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    return {name: value for name, value in values.items() if value is not None}


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Lets a command take a dataclass of options: each of its fields becomes an option of the command.

    A command that shares twenty options with another then names two groups instead of twenty parameters.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @wraps(command)
    def with_groups(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        own = parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
        parameters += _parameters(groups[name]) if name in groups else [own]
    vars(with_groups)["__signature__"] = inspect.Signature(parameters)
    with_groups.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_groups


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(group)]
