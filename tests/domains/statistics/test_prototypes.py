"""Prototypes are deterministic; the index sorts domains by similarity."""

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from lorary.domains.statistics.prototypes import (
    BLOCKS_PER_PROTOTYPE,
    MAX_PROTOTYPES,
    Neighbour,
    PrototypeIndex,
    cluster,
    make_prototypes,
)

FEATURES = 24


def means(seed: int, blocks: int = 40, spread: float = 0.3) -> Tensor:
    """Block means scattered around a random direction, far from the origin like hidden states."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(FEATURES, generator=generator)
    return 10 + direction + spread * torch.randn(blocks, FEATURES, generator=generator)


CENTRE = torch.full((FEATURES,), 10.0)


@pytest.mark.parametrize(
    ("blocks", "count"),
    [(1, 1), (2, 1), (4, 1), (7, 1), (8, 2), (63, 15), (64, MAX_PROTOTYPES), (500, MAX_PROTOTYPES)],
)
def test_the_number_of_prototypes_grows_with_the_text(blocks: int, count: int) -> None:
    assert make_prototypes(means(0, blocks), CENTRE).shape == (count, FEATURES)
    assert count == max(1, min(MAX_PROTOTYPES, blocks // BLOCKS_PER_PROTOTYPE))


def test_prototypes_are_unit_vectors_in_float32() -> None:
    prototypes = make_prototypes(means(0).double(), CENTRE.double())

    assert prototypes.dtype == torch.float32
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(len(prototypes)))


def test_one_prototype_is_the_direction_of_the_mean() -> None:
    blocks = means(0, 4)

    (prototype,) = make_prototypes(blocks, CENTRE)

    units = torch.nn.functional.normalize(blocks - CENTRE, dim=-1)
    torch.testing.assert_close(prototype, torch.nn.functional.normalize(units.mean(0), dim=0))


def test_the_same_text_gives_the_same_prototypes_bit_for_bit() -> None:
    first = make_prototypes(means(0, 200), CENTRE)
    torch.manual_seed(99)
    np.random.seed(99)

    assert torch.equal(make_prototypes(means(0, 200), CENTRE), first)


def test_the_number_of_threads_has_no_effect_and_is_restored() -> None:
    threads = faiss.omp_get_max_threads()
    first = make_prototypes(means(0, 200), CENTRE)
    faiss.omp_set_num_threads(3)
    try:
        assert torch.equal(make_prototypes(means(0, 200), CENTRE), first)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(threads)


def test_the_inputs_are_not_changed() -> None:
    blocks, before = means(0), means(0)

    make_prototypes(blocks, CENTRE)

    assert torch.equal(blocks, before)


@pytest.fixture
def domains() -> dict[str, Tensor]:
    return {name: make_prototypes(means(seed), CENTRE) for seed, name in enumerate(("legal", "code", "medicine"))}


@pytest.fixture
def index(domains: dict[str, Tensor]) -> PrototypeIndex:
    return PrototypeIndex(list(domains), list(domains.values()))


@pytest.mark.parametrize("name", ["legal", "code", "medicine"])
def test_a_domain_is_nearest_to_itself(name: str, domains: dict[str, Tensor], index: PrototypeIndex) -> None:
    first, second, third = index.neighbours(domains[name])

    assert first.name == name
    assert first.similarity == pytest.approx(1, abs=1e-5)
    assert first.similarity > second.similarity + 0.1
    assert second.similarity >= third.similarity


def test_other_text_of_a_domain_is_nearest_to_it(index: PrototypeIndex) -> None:
    generator = torch.Generator().manual_seed(77)
    other = means(1, 3) + 0.3 * torch.randn(3, FEATURES, generator=generator)

    nearest = index.neighbours(make_prototypes(other, CENTRE))[0]

    assert nearest.name == "code"
    assert nearest.similarity > 0.8


def test_similarity_is_the_mean_cosine_to_the_nearest_prototypes(domains: dict[str, Tensor]) -> None:
    queries = make_prototypes(means(9), CENTRE)
    index = PrototypeIndex(list(domains), list(domains.values()))

    for neighbour in index.neighbours(queries):
        expected = (queries @ domains[neighbour.name].T).max(dim=1).values.mean()
        assert neighbour.similarity == pytest.approx(float(expected), abs=1e-5)


def test_the_length_of_a_query_does_not_matter(index: PrototypeIndex) -> None:
    query = means(1, 5) - CENTRE

    long, short = index.neighbours(100 * query), index.neighbours(query)

    assert [n.name for n in long] == [n.name for n in short]
    assert [n.similarity for n in long] == pytest.approx([n.similarity for n in short], abs=1e-5)


def test_the_opposite_of_a_domain_has_similarity_minus_one() -> None:
    query = torch.eye(FEATURES)[:1]

    (neighbour,) = PrototypeIndex(["legal"], [-query]).neighbours(query)

    assert neighbour == Neighbour("legal", -1.0)


def test_equal_similarities_are_sorted_by_name() -> None:
    same = torch.eye(FEATURES)[:2]

    found = PrototypeIndex(["legal", "code", "medicine"], [same, same, same]).neighbours(same)

    assert [n.name for n in found] == ["code", "legal", "medicine"]


def test_an_empty_index_has_no_neighbours() -> None:
    assert PrototypeIndex([], []).neighbours(torch.eye(FEATURES)[:1]) == []


def test_k_means_finds_two_clusters() -> None:
    points = np.concatenate([np.zeros((10, 3)), np.ones((10, 3))]).astype(np.float32)

    found = cluster(points, 2, spherical=False)

    assert sorted(found[:, 0].tolist()) == pytest.approx([0, 1])
