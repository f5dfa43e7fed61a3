"""`registry version`: versions of this program and of the libraries it uses."""

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from ..options import Json
from ..show import output
from ..show.page import Page, cell, fields


def version(as_json: Json = False) -> None:
    """Print the versions of lorary and of its main dependencies.

    Example: registry version
    """
    names = ("lorary", "torch", "transformers", "safetensors", "faiss-cpu", "huggingface-hub", "typer")
    found = {name: _installed(name) for name in names} | {"python": platform.python_version()}
    page = Page(data={"versions": found}, blocks=(fields((name, cell(number)) for name, number in found.items()),))
    output.show(page, command="version", as_json=as_json)


def _installed(name: str) -> str:
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return "not installed"
