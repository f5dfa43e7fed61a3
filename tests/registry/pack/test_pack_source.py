"""Packs in folders and in memory: verified bytes of regular files, and nothing outside the folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorary.domains.errors import IntegrityError
from lorary.registry.pack.pack_source import PackBytes, PackFolder, read_plain
from lorary.registry.store.manifest import PackManifest

EXPERT = "experts/e0/adapter_model.safetensors"


@pytest.fixture
def folder(loose: Any, tmp_path: Path) -> tuple[PackFolder, PackManifest]:
    """A pack in a folder that may be changed, and its manifest."""
    manifest = loose().write_to(tmp_path / "pack")
    return PackFolder(tmp_path / "pack"), manifest


def link_to_a_file(path: Path, data: bytes) -> None:
    outside = path.parents[2].with_name("outside")
    outside.write_bytes(data)
    path.symlink_to(outside)


def link_to_itself(path: Path, data: bytes) -> None:
    path.symlink_to(path)


def pipe(path: Path, data: bytes) -> None:
    os.mkfifo(path)


def a_folder(path: Path, data: bytes) -> None:
    path.mkdir()


def nothing(path: Path, data: bytes) -> None:
    pass


def a_byte_more(path: Path, data: bytes) -> None:
    path.write_bytes(data + b"\0")


def a_byte_less(path: Path, data: bytes) -> None:
    path.write_bytes(data[:-1])


def other_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(bytes(len(data)))


def a_gigabyte(path: Path, data: bytes) -> None:
    path.touch()
    os.truncate(path, 1 << 30)  # a hole: it takes no space


REPLACEMENTS = [
    link_to_a_file,
    link_to_itself,
    pipe,
    a_folder,
    nothing,
    a_byte_more,
    a_byte_less,
    other_bytes,
    a_gigabyte,
]


def test_a_folder_and_memory_give_the_same_bytes(folder: Any, loose: Any) -> None:
    source, manifest = folder

    assert source.manifest() == manifest
    source.check_nothing_else(manifest)
    for file in manifest.files:
        assert source.read(manifest, file.path) == loose().files[file.path]


@pytest.mark.parametrize("replacement", REPLACEMENTS, ids=lambda function: function.__name__)
def test_what_is_not_the_file_itself_is_refused(replacement: Callable[[Path, bytes], None], folder: Any) -> None:
    source, manifest = folder
    path = source.folder / EXPERT
    data = path.read_bytes()
    path.unlink()
    replacement(path, data)

    with pytest.raises(IntegrityError):
        source.read(manifest, EXPERT)


def test_a_device_is_not_read(tmp_path: Path) -> None:
    device = tmp_path / "zero"
    try:
        os.mknod(device, 0o600 | 0o020000, os.makedev(1, 5))
    except OSError:
        pytest.skip("making devices is not allowed here")

    with pytest.raises(IntegrityError, match="no regular file"):
        read_plain(tmp_path, "zero", limit=10)


def test_a_linked_folder_on_the_way_is_refused(folder: Any) -> None:
    source, manifest = folder
    (source.folder / "experts").rename(source.folder.parent / "elsewhere")
    (source.folder / "experts").symlink_to(source.folder.parent / "elsewhere")

    with pytest.raises(IntegrityError) as caught:
        source.read(manifest, EXPERT)

    assert "link" in str(caught.value.cause)


def test_a_hard_link_is_a_file_like_others_and_verified_like_them(folder: Any) -> None:
    source, manifest = folder
    path = source.folder / EXPERT
    os.link(path, source.folder.parent / "twin")
    assert source.read(manifest, EXPERT)
    (source.folder.parent / "secret").write_bytes(b"root:x:0:0")
    path.unlink()
    os.link(source.folder.parent / "secret", path)

    with pytest.raises(IntegrityError, match="differs from its manifest"):
        source.read(manifest, EXPERT)


@pytest.mark.parametrize("name", ["more.bin", "experts/e0/evil.py", "experts/e9/x", "\x1b[31m", ".hidden", "eval"])
def test_what_the_manifest_does_not_name_is_refused(name: str, folder: Any) -> None:
    source, manifest = folder
    (source.folder / name).parent.mkdir(exist_ok=True)
    (source.folder / name).mkdir() if name == "eval" else (source.folder / name).write_bytes(b"")

    with pytest.raises(IntegrityError, match="more than its manifest names"):
        source.check_nothing_else(manifest)


@pytest.mark.parametrize("target", ["..", "/", "experts"])
def test_a_link_beside_the_files_is_refused_and_not_followed(target: str, folder: Any) -> None:
    source, manifest = folder
    (source.folder / "link").symlink_to(target)

    with pytest.raises(IntegrityError, match="more than its manifest names"):
        source.check_nothing_else(manifest)


def test_a_file_in_place_of_a_folder_is_said(folder: Any) -> None:
    source, manifest = folder
    (source.folder / "router").rename(source.folder.parent / "router")
    (source.folder / "router").write_bytes(b"")

    with pytest.raises(IntegrityError):
        source.check_nothing_else(manifest)
    with pytest.raises(IntegrityError):
        source.read(manifest, "router/router.json")


def test_a_file_that_is_missing_in_memory_is_said(loose: Any) -> None:
    manifest, source = loose().sealed()

    with pytest.raises(IntegrityError, match="is missing"):
        PackBytes({}).read(manifest, EXPERT)
    assert source.read(manifest, EXPERT)
