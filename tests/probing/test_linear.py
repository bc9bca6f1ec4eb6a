import numpy as np
import pytest

from vaelab.probing.linear import class_share, fit_linear_probe, logistic_path, measure_accuracy


def test_a_score_counts_and_has_both_baselines_of_the_training_classes():
    found = measure_accuracy([0, 1, 1, 2], [0, 1, 2, 2], training_labels=[2, 2, 1])
    assert (found.accuracy, found.chance, found.count, found.uniform) == (0.75, 0.5, 4, 0.5)
    assert found.low < 0.75 < found.high
    assert measure_accuracy([0, 0], [0, 0], training_labels=[1, 1, 0]).chance == 0
    with pytest.raises(ValueError, match=r"^predicted: "):
        measure_accuracy([0], [0, 0], [0])


def clusters(count, seed, separation=3.0, d=5, classes=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    vectors = rng.normal(size=(count, d))
    vectors[np.arange(count), labels] += separation
    return 100 * vectors + 1000, labels


def test_a_probe_finds_what_is_linear_in_any_unit_and_nothing_where_there_is_nothing():
    learn, validate, test = clusters(300, 0), clusters(100, 1), clusters(400, 2)
    found = fit_linear_probe(learn, validate, test[0])
    nearest = (test[0][:, :4]).argmax(1)
    accuracy = (found.predicted == test[1]).mean()
    assert accuracy > 0.9 and abs(accuracy - (nearest == test[1]).mean()) < 0.03
    moved = [((x - 1000) / 100, y) for x, y in (learn, validate, test)]
    assert np.array_equal(fit_linear_probe(*moved[:2], moved[2][0]).predicted, found.predicted)
    shuffled = (learn[0], np.random.default_rng(0).permutation(learn[1]))
    nothing = measure_accuracy(fit_linear_probe(shuffled, validate, test[0]).predicted, test[1], learn[1])
    assert nothing.low < 0.32


def test_the_strength_is_the_best_on_the_validation_examples_and_of_equals_the_most_regularised():
    learn, validate, test = clusters(40, 0, 1.0, d=30), clusters(200, 1, 1.0, d=30), clusters(5, 2, 1.0, d=30)
    found = fit_linear_probe(learn, validate, test[0], strengths=[10.0, 0.01, 1e-5])
    alone = {c: fit_linear_probe(learn, validate, test[0], strengths=[c]).validation for c in (10.0, 0.01, 1e-5)}
    assert found.validation == max(alone.values())
    assert found.strength == min(c for c, accuracy in alone.items() if accuracy == found.validation)
    assert len(set(alone.values())) > 1


@pytest.mark.parametrize("classes", [2, 7])
def test_fits_along_the_strengths_are_those_of_scikit_learn(classes):
    """Strongly correlated vectors: the same objective, and the same predictions but for a picture or two."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=300)
    mixing = rng.normal(size=(20, 20)) * np.logspace(0, -3, 20)[:, None]
    vectors = (rng.normal(size=(300, 20)) + 0.7 * np.eye(20)[labels]) @ mixing
    vectors = (vectors - vectors.mean(0)) / vectors.std(0)
    strengths = [1e-3, 1e-1, 10.0]
    for strength, fit in zip(strengths, logistic_path(vectors, labels, strengths), strict=True):
        reference = LogisticRegression(C=strength, max_iter=20_000, tol=1e-8).fit(vectors, labels)
        weights, offsets = fit.weights, fit.offsets
        if classes == 2:
            weights, offsets = weights[:, [1]] - weights[:, [0]], offsets[[1]] - offsets[[0]]
        expected = _objective(vectors, labels, reference.coef_.T, reference.intercept_, strength)
        assert _objective(vectors, labels, weights, offsets, strength) == pytest.approx(expected, rel=1e-4)
        assert (fit.predict(vectors) != reference.predict(vectors)).sum() <= 2


def _objective(vectors, labels, weights, offsets, strength):
    logits = vectors @ weights + offsets
    logits = np.hstack([np.zeros_like(logits), logits]) if logits.shape[1] == 1 else logits
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    return strength * loss.sum() + (weights**2).sum() / 2


def test_wrong_input_is_refused():
    learn = clusters(10, 0)
    with pytest.raises(ValueError, match=r"^strengths: "):
        fit_linear_probe(learn, learn, learn[0], strengths=[])
    with pytest.raises(ValueError, match="of one class"):
        fit_linear_probe((learn[0], np.zeros(10, int)), learn, learn[0])
    with pytest.raises(ValueError, match=r"^count: "):
        measure_accuracy([], [], [0])


def test_the_share_between_classes_is_that_of_analysis_of_variance_and_0_by_chance():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    vectors = rng.normal(size=(60, 1)) + labels[:, None]
    groups = [vectors[labels == c, 0] for c in range(3)]
    within = sum(((one - one.mean()) ** 2).sum() for one in groups)
    expected = 1 - within / 57 / vectors.var(ddof=1)
    assert class_share(vectors, labels) == pytest.approx(expected, rel=1e-12)
    assert class_share(vectors, labels + 5) == pytest.approx(expected, rel=1e-12)
    assert class_share(labels[:, None] * [[1.0, 2.0]], labels) == pytest.approx(1)
    dealt = [class_share(rng.normal(size=(60, 5)), labels) for _ in range(200)]
    assert abs(np.mean(dealt)) < 0.01
    assert class_share(np.ones((60, 2)), labels) == 0
    for one_class in (np.zeros(60), np.arange(60)):
        with pytest.raises(ValueError, match=r"^labels: 60 vectors"):
            class_share(vectors, one_class)
