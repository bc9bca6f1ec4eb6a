import json
import shutil

import pytest

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
    assert list(provenance.embedded_weights()) == ["clip", "dit", "language_model", "pipeline", "vae"]


@pytest.mark.parametrize(
    ("label", "params", "models"),
    [
        ("10_finetune_vae/a", {"model": "embedded"}, ("vae",)),
        ("13_logit_lens/a", {"model": "outputs/10_finetune_vae/study-glyphs/runs/x/vae"}, ("vae",)),
        ("13_logit_lens/a", {"model": "outputs/10_finetune_vae/paper-fonts/runs/x/vae"}, ()),
        ("10_finetune_vae/a", {"model": "stabilityai/sdxl-vae"}, ()),
        ("33_block_ablation/a", {"model": "embedded"}, ("pipeline",)),
        ("42_diffc/a", {"model": "embedded"}, ("pipeline",)),
        ("44_visual_reasoning/a", {"model": "embedded"}, ("pipeline", "clip", "language_model")),
        ("42_diffc/a", {"model": "embedded-dit"}, ("dit",)),
        ("43_pca_maps/a", {"model": "embedded", "other_model": "embedded-dit"}, ("pipeline", "dit")),
    ],
)
def test_a_run_depends_on_the_models_that_it_used(label, params, models):
    assert provenance.depends_on(label, params) == models
