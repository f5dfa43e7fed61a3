import threading
from pathlib import Path

import pytest

from lorary.domains.errors import InputError, IntegrityError, NotFoundError
from lorary.registry.store.files import folder_lock
from lorary.registry.store.versions import DomainFolder, no_such_domain, no_such_store, no_such_version


@pytest.fixture
def folder(tmp_path):
    return DomainFolder(tmp_path, "legal")


def test_unknown_domain_has_nothing(folder):
    assert folder.versions() == []
    assert folder.aliases() == {}


def test_append_tells_the_manifest_its_number(folder):
    numbers = [folder.append(lambda n: f"{n}".encode(), first_only=False) for _ in range(3)]

    assert numbers == [1, 2, 3]
    assert [folder.manifest_path(n).read_bytes() for n in numbers] == [b"1", b"2", b"3"]


def test_append_takes_the_next_number_when_somebody_is_faster(folder):
    def manifest_of(version):
        if version == 1:
            folder.link(1, b"theirs")
        return b"ours"

    assert folder.append(manifest_of, first_only=False) == 2
    assert folder.manifest_path(1).read_bytes() == b"theirs"


def test_first_append_gives_up_when_somebody_is_faster(folder):
    def manifest_of(version):
        folder.link(1, b"theirs")
        return b"ours"

    with pytest.raises(FileExistsError):
        folder.append(manifest_of, first_only=True)

    assert folder.versions() == [1]
    assert folder.manifest_path(1).read_bytes() == b"theirs"


def test_first_append_gives_up_where_only_a_later_version_is_left(folder):
    folder.path.mkdir(parents=True)
    folder.manifest_path(2).write_bytes(b"")

    with pytest.raises(FileExistsError):
        folder.append(lambda n: b"", first_only=True)


def test_advance_never_moves_an_alias_back(folder):
    folder.advance_alias("latest", 4)
    folder.advance_alias("latest", 3)

    assert folder.aliases() == {"latest": 4}


def test_set_moves_an_alias_back(folder):
    folder.set_alias("latest", 4)
    folder.set_alias("latest", 3)

    assert folder.aliases() == {"latest": 3}


@pytest.mark.parametrize("method", ["advance_alias", "set_alias"])
def test_alias_waits_for_another_writer(folder, method):
    folder.set_alias("latest", 1)
    writer = threading.Thread(target=getattr(folder, method), args=("latest", 3))

    with folder_lock(folder.path / "aliases"):
        writer.start()
        writer.join(timeout=0.5)
        assert writer.is_alive()
        assert folder.aliases() == {"latest": 1}
    writer.join(timeout=30)

    assert folder.aliases() == {"latest": 3}


def test_alias_outside_the_grammar_is_refused(folder):
    with pytest.raises(InputError):
        folder.set_alias("../x", 1)


def test_damaged_alias_says_how_to_repair_it(folder):
    folder.set_alias("latest", 1)
    (folder.path / "aliases" / "latest").write_bytes(b"\xff" * 100)

    for _sealed in (True, False):
        with pytest.raises(IntegrityError, match="latest is damaged") as caught:
            folder.aliases()
        assert caught.value.fix == "Set it again: registry alias legal@VERSION latest"
        folder.seals.drop("aliases/latest")


@pytest.mark.parametrize(
    ("error", "message", "cause", "fix"),
    [
        (no_such_store(Path("/s")), "There is no store in /s.", None, "Make one: registry init --store /s"),
        (
            no_such_domain("leagl", known=["legal", "tax"]),
            "There is no domain named 'leagl'.",
            "Known domains: legal, tax.",
            "Did you mean legal?",
        ),
        (
            no_such_domain("zoo", known=[]),
            "There is no domain named 'zoo'.",
            "Known domains: none.",
            "Add it: registry add-domain zoo --data FILE",
        ),
        (
            no_such_domain("medicine", known=[]),
            "There is no domain named 'medicine'.",
            "Known domains: none.",
            "Add it: registry add-domain medicine",
        ),
        (
            no_such_version("legal", "lates", versions=[1, 2], aliases={"latest": 2}),
            "There is no legal@lates.",
            "Known versions: 1, 2. Aliases: latest = 2.",
            "Did you mean latest?",
        ),
        (
            no_such_version("legal", 7, versions=[1], aliases={}),
            "There is no legal@7.",
            "Known versions: 1. Aliases: none.",
            "See what there is: registry show legal",
        ),
    ],
)
def test_error_says_what_is_there_and_what_helps(error, message, cause, fix):
    assert isinstance(error, NotFoundError)
    assert (error.message, error.cause, error.fix) == (message, cause, fix)


def test_long_list_is_cut_and_the_rest_counted():
    error = no_such_domain("zoo", known=[f"d{i}" for i in range(10_000)])

    assert str(error.cause).endswith("d19 and 9980 more.")
