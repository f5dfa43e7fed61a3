import errno
import os
import stat

import pytest

from lorary.domains.errors import LoraryError, StorageFullError
from lorary.registry.store.files import fsync_folder, make_folder, touch, write_atomic, write_once

WRITERS = [write_atomic, write_once]


def fail_with(monkeypatch, function, number):
    """Let a function of `os` fail as a full or protected disk makes it fail."""

    def failing(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("size", [0, 1, 63, 1 << 20])
def test_file_has_the_bytes_and_no_temporary_file_stays(tmp_path, write, size):
    data = os.urandom(size)

    write(tmp_path / "a", data)

    assert (tmp_path / "a").read_bytes() == data
    assert os.listdir(tmp_path) == ["a"]


def test_write_atomic_replaces_even_a_read_only_file(tmp_path):
    write_atomic(tmp_path / "a", b"old", mode=0o444)

    write_atomic(tmp_path / "a", b"new", mode=0o444)

    assert (tmp_path / "a").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o444


def test_write_once_keeps_what_is_there(tmp_path):
    write_once(tmp_path / "a", b"old")

    with pytest.raises(FileExistsError):
        write_once(tmp_path / "a", b"new")

    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("write", WRITERS)
def test_short_writes_are_continued(tmp_path, monkeypatch, write):
    whole_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: whole_write(descriptor, data[:7]))

    write(tmp_path / "a", bytes(range(100)))

    assert (tmp_path / "a").read_bytes() == bytes(range(100))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("function", ["write", "fsync", "open", "close"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch, write, function, number):
    with monkeypatch.context() as patch:
        fail_with(patch, function, number)
        with pytest.raises(StorageFullError) as caught:
            write(tmp_path / "a", b"data")

    assert str(tmp_path / "a") in caught.value.message
    assert caught.value.cause == os.strerror(number)
    assert "registry gc" in str(caught.value.fix)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_full_disk_keeps_the_old_bytes(tmp_path, monkeypatch, function):
    write_atomic(tmp_path / "a", b"old")

    with monkeypatch.context() as patch:
        fail_with(patch, function, errno.ENOSPC)
        with pytest.raises(StorageFullError):
            write_atomic(tmp_path / "a", b"new")

    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("write", WRITERS)
def test_protected_disk_is_said(tmp_path, monkeypatch, write):
    fail_with(monkeypatch, "open", errno.EROFS)

    with pytest.raises(LoraryError, match="Cannot write"):
        write(tmp_path / "a", b"data")


def test_file_system_without_hard_links_is_said(tmp_path, monkeypatch):
    fail_with(monkeypatch, "link", errno.EPERM)

    with pytest.raises(LoraryError) as caught:
        write_once(tmp_path / "a", b"data")

    assert "hard links" in str(caught.value.cause)
    assert os.listdir(tmp_path) == []


def test_link_whose_answer_was_lost_counts_as_done(tmp_path, monkeypatch):
    real_link = os.link

    def link_then_forget(source, target):
        real_link(source, target)
        raise FileExistsError(errno.EEXIST, "exists", target)

    monkeypatch.setattr(os, "link", link_then_forget)

    write_once(tmp_path / "a", b"data")

    assert (tmp_path / "a").read_bytes() == b"data"


@pytest.mark.parametrize(("write", "step"), [(write_atomic, "replace"), (write_once, "link")])
def test_bytes_are_flushed_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch, write, step):
    steps = []
    real_fsync, real_step = os.fsync, getattr(os, step)

    def record_fsync(descriptor):
        steps.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        real_fsync(descriptor)

    def record_step(*args):
        steps.append(step)
        real_step(*args)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, step, record_step)

    write(tmp_path / "a", b"data")

    assert steps == ["fsync file", step, "fsync folder"]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupt)

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", b"data")

    assert os.listdir(tmp_path) == []


def test_make_folder_makes_parents_and_accepts_what_is_there(tmp_path):
    make_folder(tmp_path / "a" / "b" / "c")
    make_folder(tmp_path / "a" / "b" / "c")

    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_make_folder_does_not_take_a_file_for_a_folder(tmp_path):
    (tmp_path / "a").write_bytes(b"")

    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "a")


def test_make_folder_on_a_full_disk_is_said(tmp_path, monkeypatch):
    fail_with(monkeypatch, "mkdir", errno.ENOSPC)

    with pytest.raises(StorageFullError):
        make_folder(tmp_path / "a")


def test_folder_flush_refused_by_a_network_file_system_is_no_error(tmp_path, monkeypatch):
    fail_with(monkeypatch, "fsync", errno.EINVAL)

    fsync_folder(tmp_path)


def test_touch_makes_a_file_new(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    os.utime(tmp_path / "a", (1, 1))

    touch(tmp_path / "a")

    assert (tmp_path / "a").stat().st_mtime > 1
