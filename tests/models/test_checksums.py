"""Weights that a run saved are checked against the checksums beside them."""

import json
import threading

import pytest
import xxhash

from vaelab import models
from vaelab.models import checksums

WEIGHTS = "diffusion_pytorch_model.safetensors"


def flip_last_byte(file):
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)


@pytest.fixture
def saved(tiny_vae, tmp_path):
    checksums.save_with_checksums(tiny_vae, tmp_path / "vae")
    return tmp_path / "vae"


def test_saved_weights_have_their_checksum_beside_them(saved, tiny_vae):
    expected = {WEIGHTS: xxhash.xxh3_128_hexdigest((saved / WEIGHTS).read_bytes())}
    assert json.loads((saved / checksums.CHECKSUMS).read_text()) == expected
    state = models.load_vae(str(saved), device="cpu").state_dict()
    assert all(value.equal(state[key]) for key, value in tiny_vae.state_dict().items())


def test_one_flipped_bit_is_refused_and_names_the_file(saved, tmp_path):
    flip_last_byte(saved / WEIGHTS)
    message = rf"^model: {WEIGHTS} of .* is damaged: its checksum differs from the one in checksums.json"
    for name in (saved, saved / WEIGHTS):  # the folder, and the file by itself
        with pytest.raises(ValueError, match=message):
            models.load_vae(str(name), device="cpu")
    (saved / checksums.CHECKSUMS).unlink()
    models.load_vae(str(saved), device="cpu")  # a folder without the file is loaded unchecked


def test_weights_are_loaded_while_their_checksum_is_computed(saved, monkeypatch):
    loading, own = threading.Event(), checksums.checksum

    def waits(file):
        assert loading.wait(30), "the checksum was not computed in a thread"
        return own(file)

    monkeypatch.setattr(checksums, "checksum", waits)
    with checksums.checksums_verified(saved, "it"):
        loading.set()


def test_the_checksum_explains_whatever_error_damaged_weights_cause(saved):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: len(content) // 2])  # which safetensors refuses by itself
    with pytest.raises(ValueError, match=f"^model: {WEIGHTS} of .* is damaged: its checksum differs"):
        models.load_vae(str(saved), device="cpu")


def test_weights_that_are_saved_again_have_new_checksums(saved, tiny_vae):
    before = (saved / checksums.CHECKSUMS).read_text()
    tiny_vae.decoder.conv_out.bias.data.add_(1)
    checksums.save_with_checksums(tiny_vae, saved)
    assert (saved / checksums.CHECKSUMS).read_text() != before
    models.load_vae(str(saved), device="cpu")


def test_a_save_that_is_killed_leaves_no_old_checksums(saved, tiny_vae, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tiny_vae), "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        checksums.save_with_checksums(tiny_vae, saved)
    assert not (saved / checksums.CHECKSUMS).exists()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_checksums_are_named(saved, content):
    (saved / checksums.CHECKSUMS).write_text(content)
    with pytest.raises(ValueError, match=r"^model: checksums.json of .* is damaged"):
        models.load_vae(str(saved), device="cpu")


def test_a_listed_file_that_is_missing_is_named(saved):
    (saved / WEIGHTS).rename(saved / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ValueError, match=rf"^model: {WEIGHTS} of .* is missing; checksums.json in .* lists it"):
        models.load_vae(str(saved), device="cpu", variant="fp16")


def test_every_part_of_a_saved_pipeline_is_checked(small_pipeline, tmp_path):
    checksums.save_with_checksums(small_pipeline("sd"), tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (tmp_path / part).glob("*.safetensors")
        flip_last_byte(file)
        with pytest.raises(ValueError, match=rf"^model: {file.name} of .* is damaged: its checksum differs"):
            models.load_pipeline(str(tmp_path), device="cpu")
        flip_last_byte(file)
    models.load_pipeline(str(tmp_path), device="cpu")


def test_checksums_do_not_change_a_models_identity(saved):
    known = models.identity(str(saved), kind="vae")
    (saved / checksums.CHECKSUMS).unlink()
    assert models.identity(str(saved), kind="vae") == known
