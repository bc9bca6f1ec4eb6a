import pytest
import torch
import transformers

from vaelab.models.clip import Clip, load_clip
from vaelab.probing.clip import ZeroShotClip, prompt_texts

CLASSES = {"colour": ["red", "dark_blue"], "shape": ["circle", "square", "star"]}


@pytest.fixture(scope="module")
def names(clip_folder):
    return ZeroShotClip(load_clip(str(clip_folder), device="cpu"), prompt_texts("a {colour} {shape}", CLASSES))


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(5, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_texts_are_the_prompt_with_one_factor_at_a_time():
    made = prompt_texts("a photo of a {colour} {shape}, alone", CLASSES)
    assert made["colour"] == ["a photo of a red , alone", "a photo of a dark blue , alone"]
    assert made["shape"][2] == "a photo of a star, alone"
    for wrong in ("a photo", "a {size} thing"):
        with pytest.raises(ValueError, match=r"^prompt: with clip it must have one or more of colour, shape in braces"):
            prompt_texts(wrong, CLASSES)


def test_logits_are_those_of_the_whole_model_in_float64(clip_folder, names, pixels):
    model = transformers.CLIPModel.from_pretrained(clip_folder).double().eval()
    processor = transformers.AutoProcessor.from_pretrained(clip_folder)
    found = ZeroShotClip(Clip(model, processor), names.texts).logits(pixels)
    images = list(((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    for factor, each in names.texts.items():
        given = processor(text=each, images=images, return_tensors="pt", padding=True)
        given["pixel_values"] = given["pixel_values"].double()
        with torch.no_grad():
            expected = model(**given).logits_per_image
        torch.testing.assert_close(found[factor], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(names.logits(pixels)[factor].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_planted_text_is_found(names, pixels):
    """The texts of shapes are put where three of the pictures are: each picture is nearest to its own."""
    planted = ZeroShotClip(names.clip, names.texts)
    with torch.no_grad():
        given = names.clip.processor(
            images=list(((pixels[:3] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()),
            return_tensors="pt",
        )
        seen = names.clip.model.get_image_features(**given)
    seen = getattr(seen, "pooler_output", seen)
    planted._embedded["shape"] = torch.nn.functional.normalize(seen[[2, 0, 1]], dim=-1)
    assert [one["shape"] for one in planted.classify(pixels[:3])] == [1, 2, 0]


def test_a_picture_is_named_by_itself(names, pixels):
    whole = names.logits(pixels)
    for factor, each in whole.items():
        assert each.shape == (5, len(CLASSES[factor]))
        for i in range(5):
            torch.testing.assert_close(names.logits(pixels[i : i + 1])[factor][0], each[i], rtol=1e-5, atol=1e-5)
    chosen = {factor: each.argmax(1).tolist() for factor, each in whole.items()}
    assert names.classify(pixels) == [{factor: each[i] for factor, each in chosen.items()} for i in range(5)]


def test_texts_of_other_lengths_beside_a_text_change_nothing(names):
    alone = ZeroShotClip(names.clip, {"shape": ["a circle", "a star"]})
    padded = ZeroShotClip(names.clip, {"shape": ["a circle", "a star", "a large dark blue star " * 9]})
    torch.testing.assert_close(alone._embedded["shape"], padded._embedded["shape"][:2], rtol=1e-5, atol=1e-6)


def test_one_class_is_refused(names):
    with pytest.raises(ValueError, match=r"^classes: CLIP needs two or more classes to choose from, colour has 1"):
        ZeroShotClip(names.clip, {"colour": ["a red thing"]})
