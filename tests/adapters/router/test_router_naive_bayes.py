"""Token evidence equals scikit-learn's multinomial naive Bayes with smoothing towards the background."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorary.adapters.router.router import SMOOTHING, UNIFORM_SHARE, router_rows
from lorary.domains.statistics.statistics import PAIR_BUCKETS, DomainStatistics

naive_bayes = pytest.importorskip("sklearn.naive_bayes")

COUNTS = st.lists(st.lists(st.integers(0, 500), min_size=9, max_size=9).filter(any), min_size=2, max_size=5)


def statistics_of(token_counts: list[int]) -> DomainStatistics:
    pairs, features = torch.zeros(PAIR_BUCKETS, dtype=torch.int64), torch.eye(2, dtype=torch.float64)
    return DomainStatistics(torch.tensor(token_counts), pairs, 1.0, features[0], features)


@given(counts=COUNTS, text=st.lists(st.integers(0, 8), min_size=1, max_size=20))
def test_token_evidence_is_the_log_probability_of_scikit_learn(counts: list[list[int]], text: list[int]) -> None:
    shares = np.array([np.array(slot) / sum(slot) for slot in counts])
    background = (1 - UNIFORM_SHARE) * shares.mean(0) + UNIFORM_SHARE / shares.shape[1]

    evidence = router_rows([statistics_of(slot) for slot in counts]).token_evidence.numpy()

    # fitted on shares, not counts: the weight of pseudo-counts depends on the amount of text
    bayes = naive_bayes.MultinomialNB(alpha=SMOOTHING / (1 - SMOOTHING) * background, fit_prior=False)
    bayes.fit(shares, np.arange(len(counts)))
    np.testing.assert_allclose(evidence + np.log(background)[:, None], bayes.feature_log_prob_.T, rtol=1e-9)
    document = np.bincount(text, minlength=shares.shape[1])
    posterior = torch.tensor(document @ evidence).log_softmax(0)
    np.testing.assert_allclose(posterior, bayes.predict_log_proba(document[None])[0], atol=1e-9)
