"""Open the registry that a command works on, and silence the libraries."""

import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DEBUG

if TYPE_CHECKING:
    from ..registry import Registry


def open_registry(store: Path | None, *, device: str = "cpu", dtype: str = "auto") -> "Registry":
    """Open the registry in a folder, or find it; see `Registry.open`."""
    from ..registry import Registry

    quiet_libraries()
    return Registry.open(store, device=device, dtype=dtype)


def quiet_libraries() -> None:
    """Hide progress bars and warnings of transformers and huggingface_hub, unless $LORARY_DEBUG is set."""
    # waiting threads sleep instead of spinning: spinning costs a factor of two on a busy machine (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get(DEBUG):
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports every product whose input it casts
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def store_option(store: Path) -> str:
    """Return the --store option that another command needs here to find this registry; empty if it needs none."""
    from ..registry.store.store import locate_store

    is_found = locate_store(None, os.environ, Path.cwd()).resolve() == store.resolve()
    return "" if is_found else f" --store {shlex.quote(str(store))}"
