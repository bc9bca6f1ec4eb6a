"""Where a model of a name lies, and what identifies it."""

import json
import shutil

import huggingface_hub
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
    assert registry.locate_vae("embedded", None)[:2] == (str(models.embedded_vae_path()), None)
    assert registry.locate_vae("embedded-dit", None)[:2] == (str(shipped), "vae")


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


def test_identity_follows_a_folder_but_not_its_weights(pipeline_folder, tmp_path):
    first, moved = (shutil.copytree(pipeline_folder("dit"), tmp_path / name) for name in ("first", "moved"))
    known = models.identity(str(first))
    assert json.loads(json.dumps(known)) == known
    assert str(tmp_path) not in json.dumps(known)
    assert models.identity(str(moved)) == known
    (moved / "README.md").write_text("changes no number")
    assert models.identity(str(moved)) == known
    weights = moved / "vae" / "diffusion_pytorch_model.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-1] ^= 1
    weights.write_bytes(contents)
    assert models.identity(str(moved))["sha256"] != known["sha256"]
    assert models.identity(str(moved), kind="vae")["sha256"] != models.identity(str(first), kind="vae")["sha256"]


def test_identity_tells_variant_precision_and_the_two_embedded_models_apart(pipeline_folder):
    folder = str(pipeline_folder("dit"))
    whole = [
        models.identity(folder),
        models.identity(folder, variant="fp16"),
        models.identity(folder, precision="bfloat16"),
        models.identity(folder, kind="vae"),
        models.identity("embedded", kind="vae"),
    ]
    assert len({json.dumps(known) for known in whole}) == len(whole)
    assert whole[-1]["name"] == "embedded"
    with pytest.raises(ValueError, match=r"^kind: unknown name 'unet'"):
        models.identity(folder, kind="unet")


def test_identity_on_the_hub_is_the_commit_of_the_revision(pipeline_folder, tmp_path, monkeypatch):
    repository = tmp_path / "models--lab--small"
    (repository / "refs").mkdir(parents=True)
    for branch, commit in (("main", "a" * 40), ("old", "b" * 40)):
        (repository / "refs" / branch).write_text(commit)
        shutil.copytree(pipeline_folder("dit"), repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert (
        models.identity("lab/small")["commit"] == models.identity("lab/small", revision="a" * 40)["commit"] == "a" * 40
    )
    assert models.identity("lab/small", revision="old")["commit"] == "b" * 40
    with pytest.raises(ValueError, match=r"^model: 'nobody/nothing' could not be read from the hub"):
        models.identity("nobody/nothing")
