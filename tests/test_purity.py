from collections import Counter
from math import log2

import numpy as np
import pytest

from vaelab import purity

LABELS = np.repeat(np.arange(4), 15)
PURE = [list(range(15 * c, 15 * c + 10)) for c in range(4)]
MIXED = [list(range(15 * c + 10, 15 * c + 15)) + list(range(5)) for c in range(1, 4)]
RANDOM = np.random.default_rng(0).permutation(60).reshape(6, 10).tolist()


def plainly(top):
    """sigma_label, entropy and majority share by loops."""
    rows = []
    for pictures in top:
        classes = [int(LABELS[picture]) for picture in pictures]
        mean = sum(classes) / len(classes)
        sigma = (sum((one - mean) ** 2 for one in classes) / len(classes)) ** 0.5
        shares = [count / len(classes) for count in Counter(classes).values()]
        rows.append((sigma, -sum(share * log2(share) for share in shares), max(shares)))
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("top", [PURE, MIXED, RANDOM, PURE + MIXED + RANDOM])
def test_measures_are_those_of_a_plain_computation(top):
    found = purity.measure(LABELS, np.array(top), permutations=20)
    assert found[:3] == pytest.approx(plainly(top), rel=1e-12, abs=1e-12)
    assert found.features == len(top)


def test_pure_mixed_and_random_features_are_told_apart():
    pure, mixed, random = (purity.measure(LABELS, np.array(top), permutations=400) for top in (PURE, MIXED, RANDOM))
    assert (pure.sigma_label, pure.entropy, pure.majority) == (0, 0, 1)
    assert (mixed.entropy, mixed.majority) == (1, 0.5)
    assert pure.permutation_p == mixed.permutation_p == 1 / 401
    assert random.permutation_p > 0.05
    for one in (pure, mixed, random):
        assert one.entropy_chance == pytest.approx(random.entropy, abs=0.15)
        assert one.majority_chance == pytest.approx(random.majority, abs=0.05)


def test_the_permutation_test_is_uniform_where_there_is_nothing_to_find():
    rng = np.random.default_rng(1)
    found = [
        purity.measure(LABELS, rng.permutation(60)[:20].reshape(2, 10), permutations=39, seed=i).permutation_p
        for i in range(200)
    ]
    assert 0.4 < np.mean(found) < 0.62
    assert np.mean(np.array(found) <= 0.1) < 0.17


def test_nothing_but_sigma_label_changes_when_classes_are_renumbered():
    top = np.array(PURE[:1] + MIXED + RANDOM)
    before = purity.measure(LABELS, top, permutations=50)
    after = purity.measure(np.array([2, 0, 3, 1])[LABELS], top, permutations=50)
    for name in ("entropy", "majority", "permutation_p", "entropy_chance", "majority_chance"):
        assert getattr(before, name) == getattr(after, name), name
    assert abs(before.sigma_label - after.sigma_label) > 0.05


def test_wrong_input_is_refused():
    for labels, top in ((LABELS, np.array([[60]])), (LABELS, np.array([[-1]])), (LABELS - 1, np.array([[0]]))):
        with pytest.raises(ValueError, match=r"^top: 60 pictures"):
            purity.measure(labels, top)
    with pytest.raises(ValueError, match=r"^top: expected pictures"):
        purity.measure(LABELS, np.empty((0, 10), int))


def test_other_numberings_of_the_classes_span_what_sigma_label_can_be():
    top = np.array(MIXED)
    low, high = purity.renumbered(LABELS, top, times=200)
    assert low <= purity.measure(LABELS, top, permutations=1).sigma_label <= high
    assert high - low > 0.2
    assert purity.renumbered(LABELS, np.array(PURE)) == (0, 0)
    two = np.array([0, 1])[np.arange(60) % 2]
    assert np.ptp(purity.renumbered(two, top)) == pytest.approx(0, abs=1e-12)
