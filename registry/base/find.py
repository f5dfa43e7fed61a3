"""Find the files of a base model: the built-in pocket base, a local folder, or a model on the Hub."""

from pathlib import Path

from ...domains.data.catalog import BUILTIN
from ...domains.errors import NotFoundError
from ...domains.quantisation import is_gguf
from .custom_code import CODE_FILES, check_commit

POCKET = "pocket"  # the name of the built-in base model


def find_base(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Return the folder of a base model, or its GGUF file, downloading it into the Hub's cache if it is a Hub id.

    Args:
        source: `pocket`, a folder, a GGUF file, or a Hub id such as `owner/name`.
        revision: A branch, tag or commit of the Hub model.
        trust_remote_code: Download the Python files of the Hub model too; needs a commit.

    Raises:
        IncompatibleError: The code of a Hub model is to be trusted without a commit.
        NotFoundError: There is no such folder or model.
        RemoteError: The Hub cannot be reached or refuses the download.
    """
    if source == POCKET:
        return BUILTIN / POCKET
    folder = Path(source).expanduser()
    if source and (folder.is_dir() or (folder.is_file() and is_gguf(folder))):
        return folder.resolve()
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise NotFoundError(
            f"There is no base model {source!r}.",
            cause="it is neither 'pocket', nor a folder or GGUF file, nor a Hub id such as owner/name",
            fix="registry init --base pocket",
        )
    if trust_remote_code:
        check_commit(source, revision)
    return _download(source, revision, CODE_FILES if trust_remote_code else None)


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
