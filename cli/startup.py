"""Opens the registry that a command works on, with the libraries below kept quiet."""

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DEBUG
from .show import output

if TYPE_CHECKING:
    from ..registry import Registry


def open_registry(store: Path | None, *, device: str = "cpu", dtype: str = "auto") -> "Registry":
    """The registry in a folder, or the one that is found; see `Registry.open`."""
    from ..registry import Registry

    quiet_libraries()
    return Registry.open(store, device=device, dtype=dtype)


def quiet_libraries() -> None:
    """Keeps bars and warnings of transformers and huggingface_hub off the screen, unless one is looking for a bug."""
    # threads that wait without spinning: on a busy machine spinning costs a factor of two (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get(DEBUG):
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def store_option(store: Path) -> str:
    """The option that the next command needs to find this registry from this folder; empty where it finds it."""
    from ..registry.store.store import locate_store

    is_found = locate_store(None, os.environ, Path.cwd()).resolve() == store.resolve()
    return "" if is_found else f" --store {shlex.quote(str(store))}"


def fetch_base(base: str, revision: str | None) -> None:
    """Downloads a base model of the Hub that is not here yet, under the Hub client's own progress bars."""
    from ..registry.base.find import POCKET, find_base

    if base == POCKET or Path(base).expanduser().is_dir():
        return
    output.hint(f"Looking for {base} in the Hub's cache, else downloading it.")
    find_base(base, revision=revision)
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
