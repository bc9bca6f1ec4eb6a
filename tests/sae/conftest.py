import pytest


@pytest.fixture(scope="session")
def lab(tmp_path_factory, small_pipeline):
    """Features of a small model, with all that they are shown and scored on; made once."""
    from small_features import build

    return build(small_pipeline("sd2"), tmp_path_factory.mktemp("lab") / "store")
