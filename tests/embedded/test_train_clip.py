"""The small CLIP: its start, its batches, its loss, and that a saved one is loaded."""

import pytest
import torch
from transformers import CLIPTextModel

from vaelab import models
from vaelab.embedded import train_clip
from vaelab.models.clip import Clip, load_clip
from vaelab.models.registry import embedded_path
from vaelab.world.scenes import render, sample


@pytest.fixture(scope="module")
def small():
    return train_clip.new_clip(seed=1)


def test_the_text_model_starts_as_the_pipeline_s(small):
    model, processor = small
    encoder = CLIPTextModel.from_pretrained(embedded_path() / "text_encoder", dtype=torch.float32)
    tokens = processor.tokenizer(["a large red star on the left"], return_tensors="pt")
    with torch.no_grad():
        expected = encoder(**tokens).last_hidden_state
        assert torch.equal(model.text_model(**tokens).last_hidden_state, expected)


def test_a_batch_is_what_the_processor_makes_of_the_pictures(small):
    _, processor = small
    batch = next(train_clip.pair_batches(3, processor)(start=2))
    scenes = [sample(6 + i) for i in range(3)]
    images = list(((render(scenes) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    expected = processor(images=images, text=[scene.prompt for scene in scenes], return_tensors="pt", padding=True)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert (batch["pixel_values"] - expected["pixel_values"]).abs().max() < 0.02, "the processor's are of 8 bits"


def test_training_lowers_the_loss_and_a_saved_model_retrieves_as_it_did(tmp_path, monkeypatch):
    monkeypatch.setattr(train_clip, "BATCH_SIZE", 8)
    fresh, processor = train_clip.new_clip(seed=0)
    batch = next(train_clip.pair_batches(8, processor)())
    with torch.no_grad():
        before = train_clip.ContrastiveObjective(fresh)(batch)["loss"]
    made = train_clip.train_clip(tmp_path / "training", steps=4, device="cpu")
    with torch.no_grad():
        after = train_clip.ContrastiveObjective(made.model)(batch)
    assert after["loss"] < before and 0 <= after["accuracy"] <= 1
    share = train_clip.retrieval_accuracy(made.model, made.processor, range(6), "test")
    assert 6 * share == pytest.approx(round(6 * share), abs=1e-5), "one sixth for each picture"
    pixels = render([sample(0)])
    expected = Clip(made.model, made.processor).embed_pictures(pixels)
    models.save_in_float16(made.model, tmp_path / "saved", made.processor)
    assert (tmp_path / "saved" / "checksums.json").is_file()
    assert "text_encoder" not in (tmp_path / "saved" / "config.json").read_text(), "it does not name its source"
    assert torch.allclose(load_clip(str(tmp_path / "saved"), device="cpu").embed_pictures(pixels), expected, atol=5e-3)
