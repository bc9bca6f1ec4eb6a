"""Time and memory of the statistics of features."""

import pytest

from vaelab.bench import features


def test_every_size_grows_alone(monkeypatch):
    class Pool:
        def __init__(self, processes):
            assert processes == 1

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def apply(self, function, given):
            return function(*given)

    monkeypatch.setattr(features.multiprocessing, "get_context", lambda kind: type("Context", (), {"Pool": Pool}))
    table = features.statistics_seconds(512, 64, (1, 2), width=8, k=2)
    assert table[["vectors", "n_features"]].values.tolist() == [[512, 64], [1024, 64], [512, 128]]
    assert (table["seconds"] > 0).all() and table["encode_share"].between(0, 1).all()
    with pytest.raises(ValueError, match=r"^vectors: must be at least 256"):
        features.pass_over_vectors(10, 64, 8, 2)
