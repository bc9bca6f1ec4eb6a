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


@pytest.mark.parametrize(
    ("name", "kind"), [("embedded", "an embedded"), ("embedded-dit", "an embedded"), ("", "a local")]
)
def test_a_revision_of_a_model_that_is_not_on_the_hub_is_refused(pipeline_folder, name, kind):
    name = name or str(pipeline_folder("dit"))
    for load in (
        models.load_pipeline,
        models.load_vae,
        models.identity,
        lambda name, revision: models.identity(name, revision=revision, kind="vae"),
        lambda name, revision: models.validate_precision(name, "float32", revision),
    ):
        with pytest.raises(ValueError, match=f"^revision: 'v2' was given for .*, {kind} model; only models on the hub"):
            load(name, revision="v2")


def test_a_variant_or_configuration_that_would_be_ignored_is_refused(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path)
    folder, file = str(tmp_path), str(tmp_path / "diffusion_pytorch_model.safetensors")
    models.load_vae(file, device="cpu", config=folder)
    with pytest.raises(ValueError, match=r"^variant: 'fp16' was given for .*, a single file; only folders"):
        models.load_vae(file, device="cpu", variant="fp16")
    with pytest.raises(ValueError, match=r"^variant: 'fp16' was given for .*, an untrained model \(changes\); only"):
        models.load_vae(folder, device="cpu", variant="fp16", changes={})
    with pytest.raises(ValueError, match=r"^variant: 'embedded' has no weights of variant 'fp16'; it has none"):
        models.load_vae("embedded", device="cpu", variant="fp16")
    for name in (folder, "embedded", "owner/name"):
        with pytest.raises(ValueError, match=r"^config: .* was given for .*, which has its own; only single files"):
            models.load_vae(name, device="cpu", config=folder)
