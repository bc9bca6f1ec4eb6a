"""Where models of a name lie."""

import pytest

from vaelab import models
from vaelab.models import registry


@pytest.fixture
def shipped(pipeline_folder, monkeypatch):
    """The small class-conditional model in the embedded one's place."""
    folder = pipeline_folder("dit")
    monkeypatch.setattr(registry, "embedded_dit_path", lambda: folder)
    return folder


def test_the_embedded_models_are_told_apart(shipped):
    assert registry.pipeline_folder("embedded") == str(models.embedded_path())
    assert registry.pipeline_folder("embedded-dit") == str(shipped)
    assert registry.locate("embedded", None)[:2] == (str(models.embedded_vae_path()), None)
    assert registry.locate("embedded-dit", None)[:2] == (str(shipped), "vae")


def test_the_embedded_transformer_is_loaded_with_its_autoencoder(shipped):
    pipeline = models.load_pipeline("embedded-dit", device="cpu")
    vae = models.load_vae("embedded-dit", device="cpu")
    assert list(models.blocks(pipeline)) == ["block0", "block1"]
    for name, value in vae.state_dict().items():
        assert value.equal(pipeline.vae.state_dict()[name])


def test_a_name_near_an_embedded_one_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"^model: 'embeded-dit' is neither .*did you mean 'embedded-dit'"):
        registry.pipeline_folder("embeded-dit")
    with pytest.raises(ValueError, match=r"^model: no model_index.json in"):
        registry.pipeline_folder(str(models.embedded_vae_path()))
