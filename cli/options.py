"""Options that several commands share."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from ..adapters.config import BankConfig, TrainingConfig

_BANK, _TRAINING, _MACHINE = "New experts", "Training", "Machine"  # headings of --help
_DEFAULTS = TrainingConfig()

StorePath = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="PATH",
        help="The registry's folder. Default: $LORARY_STORE, the nearest .lorary in this folder or above, or "
        "~/.local/share/lorary.",
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
        help="Domains joined by +, with optional versions and weights: medicine@2:0.7+legal:0.3. A domain may be a "
        "pack on the Hub: hf://OWNER/REPO@v2. Alternatively, the folder of a saved composition.",
    ),
]
Static = Annotated[bool, typer.Option("--static", metavar="", help="Constant weights instead of routing.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="JSONL, JSON, CSV, TSV, TXT or Parquet file, or hf:OWNER/NAME for a dataset on the Hub. Repeatable.",
        show_default=False,
    ),
]
RawRows = Annotated[
    bool,
    typer.Option(
        "--raw",
        metavar="",
        help="Read prompts and completions as plain text, not as turns of the base's chat template.",
    ),
]
Raw = Annotated[
    bool, typer.Option("--raw", metavar="", help="Read the text as it is, not as a turn of the base's chat template.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 or mps.", rich_help_panel=_MACHINE)]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        metavar="TYPE",
        help="dtype of the base model: float32, bfloat16, float16, or auto: what the registry was made with; else on a "
        "CPU float32, or bfloat16 where the model is stored in it and this CPU is clearly faster in it.",
        rich_help_panel=_MACHINE,
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        metavar="",
        help="Exit with 9, before anything is trained or stored, if the domain takes everyday chat or an older "
        "domain's text.",
    ),
]
NoQuestions = Annotated[bool, typer.Option("--no-questions", metavar="", help="Skip the questions.")]
Temperature = Annotated[float, typer.Option(min=0.0, metavar="N", help="Sampling temperature; 0 is greedy decoding.")]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        help="Sample among the most probable tokens whose probabilities sum up to this.",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Sample among this many most probable tokens.", show_default=False),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="A text before which the answer ends. Repeatable.", show_default=False),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Random seed for sampling.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of new tokens.")]


def shape_option(text: str, *names: str, **more: Any) -> Any:
    """Declare an option about the new experts."""
    return typer.Option(*names, help=text, rich_help_panel=_BANK, **{"metavar": "N", **more})


def _training(text: str, default: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=_TRAINING, show_default=default, **{"metavar": "N", **more})


@dataclass(frozen=True, kw_only=True)
class BankOptions:
    """Options about the new experts."""

    rank: Annotated[int, shape_option("Rank of each expert.", min=1)] = BankConfig.rank
    alpha: Annotated[float, shape_option("LoRA alpha; the scale is alpha / rank.")] = BankConfig.alpha
    experts: Annotated[float, shape_option("Experts per layer, on average over the layers that have experts.")] = (
        BankConfig.experts
    )
    schedule: Annotated[
        Literal["linear", "quarters", "uniform", "data"],
        shape_option(
            "How the number of experts grows with depth; data measures it on the data.",
            metavar="linear|quarters|uniform|data",
        ),
    ] = "linear"
    targets: Annotated[
        str | None,
        shape_option("Linear modules to adapt, such as q_proj,v_proj.", metavar="NAMES", show_default="all"),
    ] = None
    no_rank_gates: Annotated[bool, shape_option("Train no rank gates.", "--no-rank-gates", metavar="")] = False
    method: Annotated[
        Literal["lora", "rslora"],
        shape_option("Scale by alpha / rank (lora) or alpha / sqrt(rank) (rslora).", metavar="lora|rslora"),
    ] = "lora"

    def config(self) -> BankConfig:
        """Return the library's configuration."""
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
    """Options about training; None means the library's default."""

    steps: Annotated[int | None, _training("Training steps.", "as many as --epochs needs", min=1)] = None
    epochs: Annotated[
        float | None, _training("Passes over the data, unless --steps is given.", str(_DEFAULTS.epochs))
    ] = None
    batch: Annotated[int | None, _training("Batch size, in blocks.", str(_DEFAULTS.batch), min=1)] = None
    block: Annotated[int | None, _training("Block length, in tokens.", str(_DEFAULTS.block), min=2)] = None
    learning_rate: Annotated[
        float | None, _training("Peak learning rate.", "2 / hidden size of the base model; for init 0.03 of that")
    ] = None
    seed: Annotated[int | None, _training("Random seed.", str(_DEFAULTS.seed))] = None
    validation: Annotated[
        float | None,
        _training(
            "Share of the rows, by document, to measure the training by: its best state is kept, and it ends early.",
            str(_DEFAULTS.validation),
            min=0.0,
            max=0.5,
        ),
    ] = None
    patience: Annotated[
        int | None,
        _training(
            "Points of the validation curve without a better one after which training ends; 0 is never.",
            str(_DEFAULTS.patience),
            min=0,
        ),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        _training(
            "Steps between checkpoints, which are also written every two minutes; a repeated command resumes from the "
            "last one.",
            str(_DEFAULTS.checkpoint_every),
            min=1,
        ),
    ] = None

    def config(self) -> TrainingConfig:
        """Return the library's configuration."""
        return TrainingConfig(**given_options(self))


def given_options(group: Any) -> dict[str, Any]:
    """Return the options of a group that were given (not None), by name."""
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    return {name: value for name, value in values.items() if value is not None}


def expand_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Turn each parameter that is a dataclass of options into one option per field.

    Commands that share twenty options then declare two parameters instead of twenty.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @wraps(command)
    def expanded(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        own = parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
        parameters += _parameters(groups[name]) if name in groups else [own]
    vars(expanded)["__signature__"] = inspect.Signature(parameters)
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    return expanded


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(group)]
