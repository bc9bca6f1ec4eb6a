import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vaelab.models.clip import load_clip


def test_embeddings_are_those_of_the_whole_model(clip_folder):
    clip = load_clip(str(clip_folder), device="cpu")
    pixels = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sentences = ["a star", "a large dark blue star"]
    given = clip.processor(
        text=sentences,
        images=list(((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()),
        return_tensors="pt", padding=True,
    )  # fmt: skip
    with torch.no_grad():
        expected = transformers.CLIPModel.from_pretrained(clip_folder).eval()(**given)
    torch.testing.assert_close(clip.embed_pictures(pixels), expected.image_embeds)
    torch.testing.assert_close(clip.embed_sentences(sentences), expected.text_embeds)


def test_a_place_without_a_model_is_refused_by_the_parameter_that_gave_it(tmp_path):
    with pytest.raises(ValueError, match=r"^similarity: 'no such' is neither a folder nor an id"):
        load_clip("no such", parameter="similarity")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^clip: .* holds no CLIP model"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched", "infinite", "cut", "derived"])
def test_weights_that_transformers_would_replace_or_drop_silently_are_refused(clip_folder, tmp_path, damage):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    weights, name = load_file(folder / "model.safetensors"), "text_model.embeddings.token_embedding.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "mismatched":
        weights[name] = weights[name][:-1].contiguous()
    elif damage == "infinite":
        weights[name][3, 1] = torch.inf
    else:
        extra = "text_model.embeddings.position_ids" if damage == "derived" else "lora.weight"
        weights[extra] = torch.arange(8)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if damage == "cut":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    if damage == "derived":
        load_clip(str(folder), device="cpu")
        return
    expected = {"infinite": f"NaN or infinite values in {name}", "cut": "holds no CLIP model"}
    other = f"has 1 {damage} weights: {'lora.weight' if damage == 'unexpected' else name}"
    with pytest.raises(ValueError, match=rf"^clip: .*{expected.get(damage, other)}"):
        load_clip(str(folder), device="cpu")
