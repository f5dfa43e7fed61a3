from dataclasses import replace
from typing import Any

import pytest

from lorary.domains.errors import IntegrityError
from lorary.registry.hub.origins import Origin, origins_of, record_origin, versions_of_repo


@pytest.fixture
def registry(light_store, light_pack):
    registry = light_store("store")
    for text in ("one", "two"):
        light_pack(registry, text=text)
    return registry


def origin(manifest, **changes):
    known: dict[str, Any] = {
        "endpoint": "https://hub.example",
        "repo": "acme/x",
        "commit": "a" * 40,
        "time": "2026-01-02T03:04:05+00:00",
    }
    about: dict[str, Any] = {"name": manifest.name, "version": manifest.version, "digest": manifest.digest}
    return Origin(**(known | about | changes))


def test_recorded_origins_are_read_back(registry):
    manifest = registry.show("legal@1")
    first, second = origin(manifest), origin(manifest, repo="alice/x")

    for each in (first, second, first):
        record_origin(registry.store, manifest, each)

    assert origins_of(registry.store, manifest) == (first, second)
    assert str(second) == "hf://alice/x@v1"


def test_a_version_without_a_record_has_no_origin(registry):
    assert origins_of(registry.store, registry.show("legal")) == ()


def test_versions_are_found_by_hub_and_repository_sorted_by_number(registry):
    for version, there in ((1, 7), (2, 3)):
        manifest = registry.show(f"legal@{version}")
        record_origin(registry.store, manifest, origin(manifest, version=there))

    found = versions_of_repo(registry.store, endpoint="https://hub.example", repo="acme/x")

    assert [(traced.manifest.version, traced.origin.version) for traced in found] == [(2, 3), (1, 7)]
    assert versions_of_repo(registry.store, endpoint="https://other.example", repo="acme/x") == []
    assert versions_of_repo(registry.store, endpoint="https://hub.example", repo="acme/y") == []


def test_origins_of_another_pack_with_the_same_number_are_ignored(registry):
    first, second = registry.show("legal@1"), registry.show("legal@2")

    record_origin(registry.store, first, origin(second, version=1))

    assert origins_of(registry.store, first) == ()


def test_a_pack_under_another_name_keeps_its_origin(registry):
    manifest = registry.show("legal@1")
    renamed = registry.store.adopt(replace(manifest, name="law"), alias=None)

    record_origin(registry.store, renamed, origin(manifest))

    assert origins_of(registry.store, renamed) == (origin(manifest),)


def test_a_damaged_origins_file_is_named(registry):
    manifest = registry.show("legal@1")
    record_origin(registry.store, manifest, origin(manifest))
    path = registry.store.path / "domains" / "legal" / "origins" / "1.json"
    path.write_text("{")

    with pytest.raises(IntegrityError, match=r"origins/1\.json"):
        origins_of(registry.store, manifest)
