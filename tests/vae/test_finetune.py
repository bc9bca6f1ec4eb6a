import json
import random
import signal
import socket
import time

import pytest
import torch
import train_small_vae
from helpers import CHILDREN, SILENT, save_silenced, without_groupnorm
from safetensors.torch import load_file

from vaelab import models
from vaelab.data.images import load_images
from vaelab.training import loop
from vaelab.training.loop import TrainConfig
from vaelab.vae import channels, finetune, objective
from vaelab.vae.finetune import StudyConfig, train_conditions, train_vae
from vaelab.vae.nudge import NudgeConfig

PLANTED = sorted((layer, channel) for layer, indices in SILENT.items() for channel in indices)


@pytest.fixture
def model(tiny_vae, tmp_path):
    return str(save_silenced(tiny_vae, tmp_path / "model"))


@pytest.fixture(scope="module")
def pictures():
    return (
        load_images("digits", resolution=16, max_images=16),
        load_images("digits", split="test", resolution=16, max_images=6),
    )


def config(nudge=None, **changes):
    training = {"steps": 6, "learning_rate": 1e-3, "log_every": 1, "device": "cpu"}
    for name in list(changes):
        if name in TrainConfig.__dataclass_fields__:
            training[name] = changes.pop(name)
    others = {"batch_size": 4, "threshold": 1e-2, "track_every": 2, **changes}
    return StudyConfig(TrainConfig(**training), NudgeConfig(interval=2, **(nudge or {})), **others)


def touched(run):
    return [(row["step"], row["layer"], channel) for row in run.interventions for channel in row["channels"]]


def scales(run, step):
    """Before and after, of every channel touched at a step."""
    rows = [row for row in run.interventions if row["step"] == step]
    return [pair for row in rows for pair in zip(row["before"], row["after"], strict=True)]


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(function, *arguments):
    """Call a function in a process of its own."""
    process = CHILDREN.Process(target=function, args=arguments)
    process.start()
    return process


def test_killed_at_any_moment_it_ends_in_the_same_bits(model, tmp_path):
    folder, checkpoint = tmp_path / "killed", tmp_path / "killed" / "checkpoint.safetensors"
    rng = random.Random(0)

    def written():
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    def early(process, before):
        time.sleep(rng.uniform(0, 0.6))

    def after_another_checkpoint(process, before):
        wait_until(process, lambda: written() > before)
        time.sleep(rng.uniform(0, 0.05))

    def writing_a_checkpoint(process, before):
        earlier = set(folder.glob(".draft-*/checkpoint*"))  # of killed processes
        wait_until(process, lambda: set(folder.glob(".draft-*/checkpoint*")) - earlier)

    def saving_the_weights(process, before):
        wait_until(process, (folder / "vae").exists)

    moments = [*[early] * 3, *[after_another_checkpoint] * 5, *[writing_a_checkpoint] * 2, saving_the_weights]
    alone = start(train_small_vae.main, model, str(tmp_path / "alone"), 100)
    kills, resumed_from = 0, set()
    for moment in moments:
        resumed_from.add(written())
        process = start(train_small_vae.main, model, str(folder), 100)
        moment(process, written())
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    last = start(train_small_vae.main, model, str(folder), 100)
    for process in (alone, last):
        process.join()
        assert process.exitcode == 0

    assert kills >= 6
    assert len(resumed_from) >= 4
    assert sorted(bytes_of(folder)) == [
        *("log.jsonl", "run.json"),
        *("vae/checksums.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    ]
    assert bytes_of(folder) == bytes_of(tmp_path / "alone")
    run = finetune.read_run(folder)
    assert run.interventions
    assert [row["step"] for row in run.validation] == [0, 25, 50, 75, 100]
    assert [row["step"] for row in run.tracked] == [1, *range(5, 101, 5)]


def wait_until(process, reached):
    while process.is_alive() and not reached():
        time.sleep(0.002)


def test_two_processes_stay_replicas(model, tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "run").mkdir()
    ranks = [start(train_small_vae.as_rank, rank, port, model, str(tmp_path / "run"), 12) for rank in (0, 1)]
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    first, second = (load_file(tmp_path / "run" / f"rank{rank}.safetensors") for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    runs = [json.loads((tmp_path / "run" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert runs[0]["interventions"] == runs[1]["interventions"]
    assert [row["channels"] for row in runs[0]["interventions"] if row["step"] == 10]
    assert runs[0]["tracked"] == runs[1]["tracked"]
    losses = [[row["loss"] for row in run["history"]] for run in runs]
    assert all(a != b for a, b in zip(*losses, strict=True))
    assert finetune.read_run(tmp_path / "run")._asdict() == runs[0]
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_nudge_touches_the_suppressed_channels_on_its_steps_and_not_after_the_last(model, pictures, tmp_path):
    run = train_vae(model, "nudge", config(learning_rate=1e-6), pictures, tmp_path)
    assert touched(run) == [(step, *one) for step in (2, 4) for one in sorted(PLANTED, key=layer_order(model))]
    assert len(scales(run, 2)) == len(PLANTED)
    for before, after in scales(run, 2):
        assert after == pytest.approx(1.1 * before, rel=1e-5)
    assert [(row["step"], row["nudged"]) for row in run.tracked] == [(1, 0), (2, 5), (4, 5), (6, 0)]


def layer_order(model):
    layers = list(channels.groupnorms(models.load_vae(model, device="cpu")))
    return lambda one: (layers.index(one[0]), one[1])


def test_baseline_scales_move_by_the_optimizer_alone(model, pictures, tmp_path):
    setting = config(undecayed=(), weight_decay=0.0)
    run = train_vae(model, "baseline", setting, pictures, tmp_path / "run", save_weights=True)
    assert run.interventions == []
    assert {row["nudged"] for row in run.tracked} == {0}
    plain = models.load_vae(model, device="cpu")
    loop.train(
        objective.VAEObjective(plain.requires_grad_(True), setting.kl_weight),
        pictures[0].shuffled(setting.batch_size, setting.train.seed),
        setting.train,
    )
    trained = models.load_vae(str(tmp_path / "run" / "vae"), device="cpu")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


def test_control_touches_as_many_active_channels_of_the_same_layers(model, pictures, tmp_path):
    run = train_vae(model, "control", config(), pictures, tmp_path)
    at_first = [one for one in touched(run) if one[0] == 2]
    assert not {one[1:] for one in at_first} & set(PLANTED)
    counts = {layer: sum(one[1] == layer for one in at_first) for layer in SILENT}
    assert counts == {layer: len(indices) for layer, indices in SILENT.items()}
    assert all(abs(before) > 0.5 for before, _ in scales(run, 2))


def test_compare_pairs_runs_by_their_seed(model, pictures, tmp_path):
    runs = train_conditions(model, ["baseline", "nudge", "control"], [0, 7], config(), pictures, tmp_path)
    assert [(run.seed, run.condition) for run in runs] == [
        (seed, condition) for seed in (0, 7) for condition in ("baseline", "nudge", "control")
    ]
    losses = {(run.condition, run.seed): [row["loss"] for row in run.history] for run in runs}
    for seed in (0, 7):
        for condition in ("nudge", "control"):
            assert losses[condition, seed][:2] == losses["baseline", seed][:2]
            assert losses[condition, seed][2:] != losses["baseline", seed][2:]
    assert losses["baseline", 0] != losses["baseline", 7]
    kept = sorted(path.parent.name for path in tmp_path.glob("*/vae"))
    assert kept == ["baseline-seed0", "control-seed0", "nudge-seed0"]
    assert {run.validation[0]["mse"] for run in runs} == {runs[0].validation[0]["mse"]}


def test_validation_counts_the_planted_channels(model, pictures, tmp_path):
    run = train_vae(model, "baseline", config(evaluate_every=4), pictures, tmp_path)
    assert [row["step"] for row in run.validation] == [0, 4, 6]
    assert run.validation[0]["suppressed"] == len(PLANTED)


def test_finished_run_is_read_back_and_not_trained_again(model, pictures, tmp_path, monkeypatch):
    first = train_vae(model, "nudge", config(), pictures, tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("*")) if path.name != "model"] == ["log.jsonl", "run.json"]
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "train", None)
        assert train_vae(model, "nudge", config(), pictures, tmp_path) == first


def test_finished_run_without_weights_is_trained_again_where_they_are_wanted(model, pictures, tmp_path, monkeypatch):
    def killed(*arguments, **options):
        (tmp_path / "run" / "vae").mkdir()
        raise KeyboardInterrupt

    first = train_vae(model, "nudge", config(), pictures, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("diffusers.AutoencoderKL.save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            train_vae(model, "nudge", config(), pictures, tmp_path / "run", save_weights=True)
    assert train_vae(model, "nudge", config(), pictures, tmp_path / "run", save_weights=True) == first
    assert (tmp_path / "run" / "vae" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-3}, "learning_rate 0.001 there, 0.002 here"),
        ({"nudge": {"nudge_factor": 1.5}}, "nudge_factor 1.1 there, 1.5 here"),
        ({"threshold": 0.1, "kl_weight": 1.0}, "kl_weight 1e-06 there, 1.0 here, threshold 0.01 there, 0.1 here"),
    ],
)
def test_finished_run_of_other_settings_is_refused_by_name(model, pictures, tmp_path, changes, named):
    train_vae(model, "nudge", config(steps=2), pictures, tmp_path)
    with pytest.raises(ValueError, match=rf"run.json was made with other settings \({named}\)"):
        train_vae(model, "nudge", config(**{"steps": 2, **changes}), pictures, tmp_path)


def test_other_pictures_are_other_settings(model, pictures, tmp_path):
    train_vae(model, "baseline", config(steps=1), pictures, tmp_path)
    others = load_images("digits", resolution=16, max_images=16, seed=1)
    with pytest.raises(ValueError, match=r"other settings \(data [^)]* here\)"):
        train_vae(model, "baseline", config(steps=1), (others, pictures[1]), tmp_path)


def test_from_scratch_the_seed_makes_the_weights(model, pictures, tmp_path):
    def scratch(seed, changes):
        folder = tmp_path / f"{seed}{len(changes)}"
        setting = config(steps=1, seed=seed, learning_rate=1e-9)
        train_vae(model, "baseline", setting, pictures, folder, changes=changes, save_weights=True)
        return models.load_vae(str(folder / "vae"), device="cpu")

    first, second = scratch(0, {}), scratch(1, {})
    assert not torch.allclose(first.decoder.conv_in.weight, second.decoder.conv_in.weight, atol=1e-3)
    assert first.encoder.mid_block.resnets[0].norm1.weight.min() > 0.9
    assert scratch(0, {"block_out_channels": [16, 16]}).decoder.conv_norm_out.num_channels == 16


def test_decayless_scales_are_spared(model, pictures, tmp_path):
    names = finetune.scale_parameters(models.load_vae(model, device="cpu"))
    setting = {"steps": 2, "weight_decay": 0.5, "learning_rate": 0.1, "clip_norm": 0}

    def trained_scales(folder, undecayed):
        train_vae(model, "baseline", config(**setting, undecayed=undecayed), pictures, tmp_path / folder,
                  save_weights=True)  # fmt: skip
        return models.load_vae(str(tmp_path / folder / "vae"), device="cpu").encoder.conv_norm_out.weight

    decayed, spared = trained_scales("decayed", ()), trained_scales("spared", names)
    assert len(names) == 2 * len(channels.groupnorms(models.load_vae(model, device="cpu")))
    assert spared.mean() - decayed.mean() > 0.05


def test_bfloat16_trains_and_measures_in_float32(model, pictures, tmp_path):
    exact, coarse = (
        train_vae(model, "baseline", config(precision=precision), pictures, tmp_path / precision)
        for precision in ("float32", "bfloat16")
    )
    assert coarse.validation[0] == exact.validation[0]
    assert coarse.history[0]["loss"] != exact.history[0]["loss"]
    assert coarse.history[0]["loss"] == pytest.approx(exact.history[0]["loss"], rel=0.05)


def test_float16_of_an_sdxl_vae_is_refused_before_anything_is_written(model, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"^precision: float16 is refused"):
        train_vae(model, "baseline", config(precision="float16"), pictures, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_model_without_groupnorm_is_refused(pictures, tmp_path):
    without_groupnorm().save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"^model: .*no GroupNorm"):
        train_vae(str(tmp_path / "tiny"), "baseline", config(), pictures, tmp_path / "run")


def test_unknown_layers_are_refused(model, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"^layers: "):
        train_vae(model, "baseline", config(layers="encoder.conv_nrm_out"), pictures, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("conditions", [["baseline", "nugde"], ["nudge"], ["baseline", "baseline"], []])
def test_bad_conditions_are_refused(model, pictures, tmp_path, conditions):
    with pytest.raises(ValueError, match=r"^conditions:"):
        train_conditions(model, conditions, [0, 1], config(), pictures, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_bad_seeds_are_refused(model, pictures, tmp_path, seeds):
    with pytest.raises(ValueError, match=r"^seeds:"):
        train_conditions(model, ["baseline", "nudge"], seeds, config(), pictures, tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        *({"interval": 0}, {"threshold": -1e-3}, {"threshold": float("nan")}, {"track_every": 0}, {"batch_size": 0}),
        *({"kl_weight": -1}, {"evaluate_every": -1}, {"near_zero_threshold": -1}, {"nudge_factor": 0.9}),
        *({"strategy": "mulitply"}, {"steps": 0}, {"precision": "half"}),
    ],
)
def test_bad_parameter_is_refused_by_name(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}:"):
        StudyConfig.of({"steps": 5}, **changes)


def test_configuration_of_a_notebooks_parameters():
    params = {"steps": 5, "learning_rate": 1e-3, "interval": 3, "threshold": 0.5, "trackers": ["tensorboard"],
              "dataset": "glyphs", "output_dir": "x", "seed": 4}  # fmt: skip
    got = StudyConfig.of(params, threshold=0.25)
    expected = TrainConfig(steps=5, learning_rate=1e-3, trackers=("tensorboard",), seed=4)
    assert got == StudyConfig(expected, NudgeConfig(interval=3), threshold=0.25)


@pytest.mark.parametrize(("name", "content"), [("run.json", '{"settings": {'), ("run.json", "[]"), ("log.jsonl", "")])
def test_a_damaged_finished_run_is_named(model, pictures, tmp_path, name, content):
    train_vae(model, "baseline", config(steps=1), pictures, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is (missing or )?damaged"):
        finetune.read_run(tmp_path / "run")


def test_validation_restores_the_mode_of_every_submodule(model, pictures):
    vae = models.load_vae(model, device="cpu").train()
    vae.encoder.mid_block.eval()
    before = [module.training for module in vae.modules()]
    finetune.Validator(vae, pictures[1], config()).validate(0)
    channels.measure_activity(vae, lambda x: models.reconstruct(vae, x), pictures[1].batches(4))
    objective.latent_scale(vae, pictures[1].batches(4))
    assert [module.training for module in vae.modules()] == before


def test_a_model_is_not_evaluated_on_the_pictures_that_it_was_trained_on(model, pictures, tmp_path):
    learning, held_out = pictures
    train_vae(model, "baseline", config(steps=1), pictures, tmp_path / "first", save_weights=True)
    trained = str(tmp_path / "first" / "vae")
    assert finetune.require_unseen(trained, held_out, "split").endswith("was not trained on " + held_out.name)
    with pytest.raises(ValueError, match=r"eval_split: .* was trained on pictures of digits.train."):
        finetune.require_unseen(trained, load_images("digits", split="train[5:7]", resolution=8), "eval_split")
    with pytest.raises(ValueError, match=r"split: .*expected a split that the model was not trained on"):
        finetune.require_unseen(str(tmp_path / "first"), learning, "split")
    # fine-tuned further on other pictures, it has still been trained on the first
    others = load_images("glyphs", resolution=16, max_images=8)
    train_vae(trained, "baseline", config(steps=1), (others, held_out), tmp_path / "second", save_weights=True)
    assert finetune.training_source(str(tmp_path / "second" / "vae")) == {**learning.source, **others.source}
    # from scratch only the configuration of the first is used
    scratch = (others, held_out)
    train_vae(trained, "baseline", config(steps=1), scratch, tmp_path / "third", changes={}, save_weights=True)
    assert finetune.training_source(str(tmp_path / "third" / "vae")) == others.source


def test_where_the_training_pictures_are_not_known_it_is_said(model, pictures):
    for name in (model, "embedded", "owner/on-the-hub"):
        assert finetune.training_source(name) is None
        assert finetune.require_unseen(name, pictures[0], "split").startswith("it is not known which pictures")


@pytest.mark.parametrize("record", ["{", "[]", '{"trained_on": [1]}', '{"trained_on": {"digits[train]": [[0]]}}'])
def test_a_damaged_record_of_the_training_pictures_is_refused(record, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(ValueError, match=r"run\.json is damaged or of another version"):
        finetune.training_source(str(tmp_path / "vae"))


def test_a_training_is_not_reused_for_a_model_whose_weights_were_replaced(model, pictures, tiny_vae, tmp_path):
    train_vae(model, "baseline", config(steps=1), pictures, tmp_path / "run")
    with torch.no_grad():
        next(tiny_vae.parameters()).add_(1e-3)
    tiny_vae.save_pretrained(model)
    with pytest.raises(ValueError, match=r"run\.json was made with other settings \(model .*sha256"):
        train_vae(model, "baseline", config(steps=1), pictures, tmp_path / "run")


def test_the_variant_of_the_weights_is_loaded(model, pictures, tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "only-fp16", variant="fp16")
    with pytest.raises(ValueError, match="fp16"):
        train_vae(str(tmp_path / "only-fp16"), "baseline", config(steps=1), pictures, tmp_path / "run")
    run = train_vae(
        str(tmp_path / "only-fp16"), "baseline", config(steps=1), pictures, tmp_path / "run", variant="fp16"
    )
    assert run.history[-1]["step"] == 1


def test_a_plan_leaves_out_finished_trainings_and_counts_validations(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "evaluate_reconstruction", lambda vae, batches: time.sleep(0.1))
    (tmp_path / "baseline-seed0").mkdir()
    (tmp_path / "baseline-seed0" / "run.json").write_text("{}")
    settings = config(steps=20, evaluate_every=5)
    plan = finetune.plan_conditions(model, ["baseline", "nudge"], [0, 1], settings, pictures, tmp_path)
    assert (plan.trainings, plan.steps) == (3, 60)
    # 6 pictures in batches of 4, before training and after every fifth step
    assert 3 * 5 * 1.5 * 0.1 < plan.seconds < 600
    weights = sum(value.nbytes for value in models.load_vae(model, device="cpu").state_dict().values())
    assert plan.disk_bytes == plan.checkpoint_bytes + weights  # of the nudge with the first seed; others leave none
    with pytest.raises(ValueError, match=r"^conditions: expected baseline"):
        finetune.plan_conditions(model, ["nudge"], [0], settings, pictures, tmp_path)
