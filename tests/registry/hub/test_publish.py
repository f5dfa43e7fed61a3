"""What is published leaves out the tokens that a text has once, and nothing else."""

import pytest
import torch

from lorary.domains.errors import IntegrityError
from lorary.domains.statistics.statistics import MIN_COUNT
from lorary.registry import Registry
from lorary.registry.hub.publish import published
from lorary.registry.pack.check_pack import check_pack
from lorary.registry.pack.pack import read_pack
from lorary.registry.store.manifest import ROUTER_TENSORS


def test_what_is_published_has_no_token_once_and_all_else(whole: Registry, fresh_copy) -> None:
    registry = fresh_copy(whole.store.path)
    manifest = registry.show("cooking")

    public = published(registry.store, manifest)

    before, after = (read_pack(registry.store, one) for one in (manifest, public))
    kept = before.statistics.without_rare_tokens()
    assert before.statistics.smallest_count == 0
    for name in ("token_counts", "pair_counts"):
        found = getattr(after.statistics, name)
        assert torch.equal(found, getattr(kept, name))
        assert 1 not in found
        assert found.max() >= MIN_COUNT
    for name, tensor in before.statistics.tensors().items():
        if not name.startswith(("token", "pair")):
            assert torch.equal(after.statistics.tensors()[name], tensor)
    assert {file.path for file in public.files if file not in manifest.files} == {ROUTER_TENSORS}
    assert public.digest != manifest.digest
    check_pack(registry.store, public)


def test_publishing_again_changes_nothing(whole: Registry, fresh_copy) -> None:
    registry = fresh_copy(whole.store.path)
    public = published(registry.store, registry.show("cooking"))

    assert published(registry.store, public) == public
    assert published(registry.store, registry.show("cooking")) == public


def test_a_damaged_file_of_statistics_is_not_published(whole: Registry, fresh_copy) -> None:
    registry = fresh_copy(whole.store.path)
    manifest = registry.show("cooking")
    path = registry.store.blobs.path(manifest.file(ROUTER_TENSORS).sha256)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    with pytest.raises(IntegrityError):
        published(registry.store, manifest)
