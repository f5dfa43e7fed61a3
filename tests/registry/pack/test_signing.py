"""Signatures made and checked by the real library, with keys made here, through a Hub of our own."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from lorary.domains.errors import ConflictError, InputError, IntegrityError
from lorary.registry.pack.signing import SIGNATURE_FILE, check_signature, sign_pack

pytest.importorskip("model_signing", reason="the extra lorary[sign] is not installed")

REPO = "acme/lorary-legal"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Private and public keys of two people: `alice`, `alice.pub`, `mallory`, `mallory.pub`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder, found = tmp_path_factory.mktemp("keys"), {}
    for name in ("alice", "mallory"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        for file, data in ((name, private), (f"{name}.pub", public)):
            found[file] = folder / file
            found[file].write_bytes(data)
    return found


def test_a_signature_holds_for_these_bytes_and_this_key(whole: Any, keys: Any) -> None:
    manifest = whole.show("cooking")
    signature = sign_pack(whole.store, manifest, keys["alice"])

    check_signature(whole.store, manifest, signature, keys["alice.pub"])

    with pytest.raises(IntegrityError, match="is not valid"):
        check_signature(whole.store, manifest, signature, keys["mallory.pub"])
    with pytest.raises(IntegrityError, match="is not valid"):
        check_signature(whole.store, whole.show("sailing"), signature, keys["alice.pub"])
    with pytest.raises(IntegrityError, match="is not valid"):
        check_signature(whole.store, replace(manifest, description="better"), signature, keys["alice.pub"])


def test_every_altered_file_is_noticed(whole: Any, keys: Any, loose: Any) -> None:
    manifest = whole.show("cooking")
    signature = sign_pack(whole.store, manifest, keys["alice"])
    pack = loose("cooking")

    for path, data in pack.files.items():
        altered, source = pack.with_files(**{path: data[:-1] + bytes([data[-1] ^ 1])}).sealed()
        with pytest.raises(IntegrityError, match="is not valid"):
            check_signature(source, altered, signature, keys["alice.pub"])


@pytest.mark.parametrize("signature", [b"", b"{}", b"[1]", b"\xff\x00", b'{"mediaType": "x"}', b"[" * 5000])
def test_what_is_no_signature_is_not_valid(whole: Any, keys: Any, signature: bytes) -> None:
    with pytest.raises(IntegrityError, match="is not valid"):
        check_signature(whole.store, whole.show("cooking"), signature, keys["alice.pub"])


def test_a_key_that_cannot_be_used_is_named(whole: Any, keys: Any, tmp_path: Path) -> None:
    for key in (tmp_path / "missing", keys["alice.pub"]):
        with pytest.raises(InputError, match="private key"):
            sign_pack(whole.store, whole.show("cooking"), key)
    with pytest.raises(InputError, match="public key"):
        check_signature(whole.store, whole.show("cooking"), b"{}", keys["alice"])


def test_the_library_alone_verifies_a_download(
    local_hub: Any, light_store: Any, light_pack: Any, keys: Any, tmp_path: Path, no_waiting: Any
) -> None:
    theirs = light_store("theirs")
    light_pack(theirs)
    theirs.push("legal", REPO, sign=keys["alice"])
    from huggingface_hub import snapshot_download

    folder = Path(shutil.copytree(snapshot_download(REPO), tmp_path / "download"))
    verify = [
        sys.executable,
        "-m",
        "model_signing",
        "verify",
        "key",
        str(folder),
        "--ignore-paths",
        f"{folder}/README.md",
    ]
    options = ["--signature", str(folder / SIGNATURE_FILE), "--public_key"]

    for name, code in (("alice.pub", 0), ("mallory.pub", 1)):
        done = subprocess.run([*verify, *options, str(keys[name])], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr


# --- through the Hub ---


@pytest.fixture
def signed(local_hub: Any, light_store: Any, light_pack: Any, keys: Any, no_waiting: Any) -> Any:
    """A registry whose domain legal is on the Hub, signed by alice."""
    registry = light_store("theirs")
    light_pack(registry)
    registry.push("legal", REPO, sign=keys["alice"])
    return registry


def test_a_pack_with_the_signature_that_is_required_is_pulled(signed: Any, light_store: Any, keys: Any) -> None:
    ours = light_store("ours")

    done = ours.pull(REPO, signer=keys["alice.pub"], name="law")

    assert (done.is_new, done.is_signed) == (True, True)
    assert not ours.pull(REPO, signer=keys["alice.pub"], name="law").is_new
    assert signed.push("legal", REPO, sign=keys["alice"]).state == "there"


def test_a_pack_that_somebody_else_signed_is_not_stored(signed: Any, light_store: Any, keys: Any) -> None:
    ours = light_store("ours")

    with pytest.raises(IntegrityError, match="is not valid"):
        ours.pull(REPO, signer=keys["mallory.pub"])

    assert ours.store.domains() == ["general"]


def test_a_pack_without_a_signature_is_not_stored(signed: Any, light_store: Any, light_pack: Any, keys: Any) -> None:
    light_pack(signed, text="two")
    signed.push("legal", REPO)  # takes the signature of the version before away
    ours = light_store("ours")

    with pytest.raises(IntegrityError, match="is not signed"):
        ours.pull(REPO, signer=keys["alice.pub"])

    assert ours.store.domains() == ["general"]
    assert ours.pull(f"{REPO}@v1", signer=keys["alice.pub"]).is_signed


def test_another_file_in_the_place_of_the_signature_is_refused(signed: Any, light_store: Any, keys: Any) -> None:
    HfApi().create_commit(REPO, [CommitOperationAdd(SIGNATURE_FILE, b"{}")], commit_message="forged")

    with pytest.raises(IntegrityError, match="is not valid"):
        light_store("ours").pull(REPO, signer=keys["alice.pub"])


def test_a_version_that_is_there_without_a_signature_is_not_changed(signed: Any, light_pack: Any, keys: Any) -> None:
    light_pack(signed, text="two")
    signed.push("legal", REPO)

    with pytest.raises(ConflictError, match="versions are immutable"):
        signed.push("legal", REPO, sign=keys["alice"])
