"""Signatures over packs: OpenSSF model signing with an elliptic-curve key of one's own, offline.

What is signed is a folder with the manifest and every file that it names, so `model_signing verify key` of the same
library checks a download without lorary. The signature lies beside the pack, as model.sig, and is no part of it.

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from ...domains.errors import IncompatibleError, InputError, IntegrityError
from ..store.manifest import MANIFEST_FILE, PackManifest
from .pack_source import PackSource

SIGNATURE_FILE: Final = "model.sig"
MAX_SIGNATURE: Final = 1 << 20  # bytes


def sign_pack(source: PackSource, manifest: PackManifest, key: Path) -> bytes:
    """The signature over a version, as the bytes of model.sig.

    Args:
        source: Where its files are.
        manifest: Of the version.
        key: A private key in PEM, of the curves P-256, P-384 or P-521, not encrypted.

    Raises:
        InputError: There is no such key, or it cannot sign.
        IntegrityError: A file of the version is damaged.
        IncompatibleError: The library is not installed.
    """
    signing, _ = _library()
    with _usable(key, "private"):
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    with TemporaryDirectory() as temporary:
        signature = Path(temporary) / SIGNATURE_FILE
        config.sign(_written(source, manifest, Path(temporary)), signature)
        return signature.read_bytes()


def check_signature(source: PackSource, manifest: PackManifest, signature: bytes, key: Path) -> None:
    """Refuses a version unless this key has signed just these bytes.

    Args:
        source: Where its files are.
        manifest: Of the version, as it was when it was signed.
        signature: The bytes of model.sig.
        key: A public key in PEM.

    Raises:
        IntegrityError: Another key signed it, or other bytes, or it is no signature.
        InputError: There is no such key, or it cannot verify.
        IncompatibleError: The library is not installed.
    """
    _, verifying = _library()
    with _usable(key, "public"):
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / SIGNATURE_FILE
        path.write_bytes(signature)
        folder = _written(source, manifest, Path(temporary))
        try:
            with redirect_stdout(io.StringIO()):  # it prints warnings there
                config.verify(folder, path)
        except Exception as error:  # whatever a stranger's file can make it raise
            raise IntegrityError(
                f"The signature of {manifest.name}@{manifest.version} is not valid.",
                cause=f"{key}: {str(error) or type(error).__name__}",
                fix="ask who pushed it for the public key, and do not use the pack until they fit",
            ) from error


def _written(source: PackSource, manifest: PackManifest, place: Path) -> Path:
    """The pack as a plain folder, every byte verified."""
    folder = place / manifest.name
    for name, data in [
        (MANIFEST_FILE, manifest.to_json()),
        *((f.path, source.read(manifest, f.path)) for f in manifest.files),
    ]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def _library() -> tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise IncompatibleError(
            "Signatures need another library.", cause=str(error), fix="pip install 'lorary[sign]'"
        ) from error
    return signing, verifying


@contextmanager
def _usable(key: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"The {kind} key {key} cannot be read.", cause=str(error.strerror)) from error
    except Exception as error:  # of cryptography: types differ with what is wrong
        raise InputError(
            f"{key} is no {kind} key that can be used.",
            cause=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix=f"give a {kind} key of the curve P-256, P-384 or P-521 in PEM, not encrypted",
        ) from error
