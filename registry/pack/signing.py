"""Pack signatures: OpenSSF model signing with a user-provided elliptic-curve key, offline.

The signature covers a folder with the manifest and every file that it lists, so `model_signing verify key` of the same
library checks a download without lorary. It is stored next to the pack as model.sig and is not part of the pack.

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
    """Sign a version and return the bytes of model.sig.

    Args:
        source: Source of its files.
        manifest: Manifest of the version.
        key: Unencrypted private key in PEM format, on the curve P-256, P-384 or P-521.

    Raises:
        InputError: The key is missing or cannot sign.
        IntegrityError: A file of the version is damaged.
        IncompatibleError: `model_signing` is not installed.
    """
    signing, _ = _library()
    with _usable(key, "private"):
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    with TemporaryDirectory() as temporary:
        signature = Path(temporary) / SIGNATURE_FILE
        config.sign(_written(source, manifest, Path(temporary)), signature)
        return signature.read_bytes()


def check_signature(source: PackSource, manifest: PackManifest, signature: bytes, key: Path) -> None:
    """Raise IntegrityError unless the signature is valid for this version and key.

    Args:
        source: Source of its files.
        manifest: Manifest of the version, as signed.
        signature: Bytes of model.sig.
        key: Public key in PEM format.

    Raises:
        IntegrityError: The signature is malformed, or does not match the key or the files.
        InputError: The key is missing or cannot verify.
        IncompatibleError: `model_signing` is not installed.
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
        except Exception as error:  # an untrusted signature can make it raise anything
            raise IntegrityError(
                f"The signature of {manifest.name}@{manifest.version} is not valid.",
                cause=f"{key}: {str(error) or type(error).__name__}",
                fix="ask the publisher for the public key, and do not use the pack until the signature is valid",
            ) from error


def _written(source: PackSource, manifest: PackManifest, place: Path) -> Path:
    """Write the pack to a plain folder, every file verified, and return the folder."""
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
            "Signatures need optional packages.", cause=str(error), fix="pip install 'lorary[sign]'"
        ) from error
    return signing, verifying


@contextmanager
def _usable(key: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"The {kind} key {key} cannot be read.", cause=str(error.strerror)) from error
    except Exception as error:  # cryptography raises many types
        raise InputError(
            f"{key} is no {kind} key that can be used.",
            cause=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix=f"use an unencrypted {kind} key in PEM format on the curve P-256, P-384 or P-521",
        ) from error
