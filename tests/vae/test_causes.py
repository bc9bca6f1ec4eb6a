from dataclasses import replace

import pandas as pd
import pytest

from vaelab import data
from vaelab.core.io import read_json
from vaelab.training.loop import TrainConfig
from vaelab.vae import causes
from vaelab.vae.finetune import StudyConfig

CONFIG = StudyConfig(
    TrainConfig(steps=2, learning_rate=1e-3, weight_decay=0.5, device="cpu"), batch_size=2, track_every=9
)


@pytest.fixture
def model(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "reference")
    return str(tmp_path / "reference")


def pictures(name):
    return data.load_pair(name, "train", "test", resolution=16, max_images=4, eval_images=4)


def test_every_variant_changes_one_thing(model, tmp_path):
    names = ["reference", "no weight decay", "scales not decayed", "half the width", "twice the length", "glyphs"]
    table = causes.train_variants(model, names, [0], CONFIG, pictures, "digits", tmp_path / "runs")
    assert list(dict.fromkeys(table["variant"])) == names
    assert table.groupby("variant")["final"].sum().eq(1).all()
    stored = {name: tmp_path / "runs" / f"{name.replace(' ', '-')}-seed0" / "run.json" for name in names}
    settings = {name: read_json(path)["settings"] for name, path in stored.items()}
    reference = settings.pop("reference")
    differing = {name: {key for key in one if one[key] != reference[key]} for name, one in settings.items()}
    assert differing == {
        "no weight decay": {"weight_decay"},
        "scales not decayed": {"undecayed"},
        "half the width": {"changes"},
        "twice the length": {"steps"},
        "glyphs": {"data"},
    }
    assert settings["half the width"]["changes"] == {"block_out_channels": [4, 8], "norm_num_groups": 2}
    assert all("norm" in name for name in settings["scales not decayed"]["undecayed"])


def test_a_strong_decay_suppresses_every_channel_unless_scales_are_not_decayed(model, tmp_path):
    train = replace(CONFIG.train, learning_rate=1e-2, weight_decay=100.0)
    config = replace(CONFIG, train=train, threshold=0.05)
    suppressed = {
        name: causes.train_variant(model, name, config, pictures, "digits", tmp_path / name).validation[-1][
            "suppressed"
        ]
        for name in ("reference", "scales not decayed")
    }
    assert suppressed["reference"] > 20 * suppressed["scales not decayed"]


def test_an_unknown_variant_lists_the_nearest(model, tmp_path):
    with pytest.raises(ValueError, match="no weight decay"):
        causes.train_variants(model, ["no weight decy"], [0], CONFIG, pictures, "digits", tmp_path)


def test_causes_are_described_by_the_shares_and_the_controls():
    shares = {"reference": 0.4, "no weight decay": 0.0, "scales not decayed": 0.02, "glyphs": 0.5}
    final = pd.DataFrame([{"variant": name, "seed": seed, "share": share} for name, share in shares.items()
                          for seed in (0, 1)])  # fmt: skip
    text = causes.describe_causes(final)
    assert "reference 40%, no weight decay 0%, scales not decayed 2%, glyphs 50% (mean over 2 seeds)." in text
    assert "the control, fewer than a tenth" in text
    final.loc[final["variant"] == "no weight decay", "share"] = 0.3
    assert "not the only cause" in causes.describe_causes(final)
    assert causes.describe_causes(final[final["variant"] == "glyphs"]).endswith("seeds).")
