"""Where a registry is: which folder is meant where none is named."""

from collections.abc import Mapping
from pathlib import Path


def locate_store(explicit: str | Path | None, environ: Mapping[str, str], cwd: Path) -> Path:
    """Where the store is, or would be: as asked, $LORARY_STORE, the nearest `.lorary` above, the user's own."""
    asked = explicit or environ.get("LORARY_STORE")
    if asked:
        return cwd / Path(asked).expanduser()
    for folder in (cwd, *cwd.parents):
        if (folder / ".lorary").is_dir():
            return folder / ".lorary"
    data_home = Path(environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():  # the XDG specification says to ignore it then
        data_home = Path(environ.get("HOME") or Path.home()) / ".local" / "share"
    return data_home / "lorary"
