"""The prototype map and the gates by layer, from stored packs and from constructed points."""

import numpy as np
import pytest

from lorary.registry import Registry
from lorary.registry.measure.report_details import principal_plane, read_details
from lorary.registry.pack.pack import read_pack


def test_points_in_a_plane_keep_their_distances():
    draw = np.random.default_rng(0)
    flat = draw.normal(size=(30, 2)) * [5.0, 1.0]
    turned, _ = np.linalg.qr(draw.normal(size=(8, 2)))
    points = flat @ turned.T + draw.normal(size=8)

    places, explained = principal_plane({"a": points[:10], "b": points[10:]})

    found = np.concatenate([places["a"], places["b"]])
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(found[:, None] - found, axis=-1), np.linalg.norm(points[:, None] - points, axis=-1), atol=1e-9
    )
    assert explained[0] > explained[1]
    assert sum(explained) == pytest.approx(1)


def test_the_axes_of_the_map_have_fixed_signs():
    points = np.random.default_rng(1).normal(size=(12, 6))

    first, _ = principal_plane({"a": points})
    mirrored, _ = principal_plane({"a": -points})

    np.testing.assert_allclose(mirrored["a"], -first["a"], atol=1e-9)


def test_a_single_point_is_at_the_origin():
    places, explained = principal_plane({"a": np.ones((1, 6))})

    assert places["a"].tolist() == [[0.0, 0.0]]
    assert explained == (0.0, 0.0)


def test_details_match_the_packs(whole: Registry):
    manifests = {manifest.name: manifest for manifest in whole.list()}

    details = read_details(whole.store, manifests)

    assert list(details.places) == list(details.gates) == ["general", "cooking", "sailing"]
    for name, manifest in manifests.items():
        pack = read_pack(whole.store, manifest)
        assert details.places[name].shape == (len(pack.prototypes), 2)
        assert [len(layer) for layer in details.gates[name]] == manifest.allocation["counts"]
        last = pack.bank.layers[max(pack.bank.layers)]
        first_rank = last.experts[0].rank
        expected = last.static_gate()[:first_rank].mean().item()
        assert details.gates[name][max(pack.bank.layers)][0] == pytest.approx(expected)
