import json
import shutil

from vaelab.runner import provenance


def test_environment_names_versions_and_processor_but_no_host(monkeypatch):
    found = provenance.environment("cpu")
    assert found["torch"].startswith("2.") and found["device"] == "cpu" and found["cores"] >= 1
    assert found["processor"]
    import platform

    assert platform.node() not in json.dumps(found)


def test_embedded_weights_change_with_any_byte_of_the_model_and_with_nothing_else(tmp_path):
    for model in ("vae", "pipeline"):
        (tmp_path / model / "unet").mkdir(parents=True)
        (tmp_path / model / "unet" / "weights.safetensors").write_bytes(bytes(range(100)))
    before = provenance.embedded_weights(tmp_path)
    assert list(before) == ["pipeline", "vae"] and before["vae"] == before["pipeline"]
    (tmp_path / "vae" / "checksums.json").write_text("{}")
    (tmp_path / "vae" / ".hidden").write_text("x")
    assert provenance.embedded_weights(tmp_path) == before
    (tmp_path / "vae" / "unet" / "weights.safetensors").write_bytes(bytes(range(99)) + b"x")
    after = provenance.embedded_weights(tmp_path)
    assert after["pipeline"] == before["pipeline"] and after["vae"] != before["vae"]
    shutil.move(tmp_path / "pipeline" / "unet", tmp_path / "pipeline" / "other")
    assert provenance.embedded_weights(tmp_path)["pipeline"] != before["pipeline"]


def test_embedded_weights_name_every_shipped_model():
    assert list(provenance.embedded_weights()) == ["dit", "pipeline", "vae"]
