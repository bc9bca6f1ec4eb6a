"""The notebook on small models of the real classes: both stages, LoRA and full, a judge, and what is refused."""

import json

import endpoint
import PIL.Image
import pytest
import small_language
from notebook_cells import ROOT, execute_cells

KINDS = ("load", "run", "show", "save")
STREAMS = ["clip + clip", "clip + up_ft0.t25"]


@pytest.fixture(scope="module")
def folders(pipeline_folder, clip_folder, tmp_path_factory):
    """A pipeline with Stable Diffusion 1.5's U-Net, a CLIP, a Llama with a chat template and an MPT without one."""
    place = tmp_path_factory.mktemp("models")
    return {
        "model": str(pipeline_folder("sd")),
        "image_encoder": str(clip_folder),
        "llama": str(small_language.save("llama", place / "llama")),
        "mpt": str(small_language.save("mpt", place / "mpt", template=False)),
    }


def chosen(folders, language, **params):
    return {
        "model": folders["model"], "image_encoder": folders["image_encoder"], "language_model": folders[language],
        "streams": STREAMS, "resolution": 32, "batch_size": 4, "longest": 4, **params,
    }  # fmt: skip


@pytest.fixture(scope="module")
def llava_files(tmp_path_factory):
    """A conversation about each of four pictures, and two test questions."""
    folder = tmp_path_factory.mktemp("llava")
    pictures, rows = [], []
    for number, colour in enumerate(("red", "blue", "green", "white")):
        pictures.append(f"{number}.png")
        PIL.Image.new("RGB", (40, 30), colour).save(folder / pictures[-1])
        said = [{"from": "human", "value": "<image>\nwhat colour is it?"}, {"from": "gpt", "value": colour}]
        rows.append({"image": pictures[-1], "conversations": said})
    lines = {
        "questions": [
            {"question_id": i, "image": pictures[i], "text": "what is it?", "category": name}
            for i, name in enumerate(("conv", "detail"))
        ],
        "contexts": [{"image": name, "caption": "a colour"} for name in pictures],
        "references": [{"question_id": i, "text": "a colour"} for i in range(2)],
    }
    (folder / "talk.json").write_text(json.dumps(rows))
    for name, each in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, each)))
    files = {name: str(folder / f"{name}.jsonl") for name in lines}
    images = dict.fromkeys(("caption_images", "instruction_images", "question_images"), str(folder))
    return {"captions": str(folder / "talk.json"), "instructions": str(folder / "talk.json"), **files, **images}


@pytest.mark.parametrize(
    ("language", "options"),
    [("llama", {"tuning": "full"}), ("mpt", {"tuning": "lora", "chat_template": "chatml", "standardize": False})],
    ids=["Llama, full", "MPT, LoRA"],
)
def test_the_paper_s_path_runs_to_relative_scores(folders, llava_files, tmp_path, monkeypatch, language, options):
    monkeypatch.chdir(ROOT)
    params = chosen(folders, language, dataset="llava", max_images=0, judge="endpoint:judge", **llava_files, **options)
    with endpoint.serving(lambda body, number: (200, endpoint.completion("8 6\nbecause"), {}), monkeypatch) as requests:
        execute_cells("44_visual_reasoning", *KINDS, output_dir=str(tmp_path / "run"), **params)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {(row["stream"], row["category"]): row for row in results["tables"]["relative"]}
    assert set(rows) == {(stream, category) for stream in STREAMS for category in ("conv", "detail", "all")}
    assert all(row["relative"] == 100 and row["first"] == 2 for row in rows.values()), "a judge that likes the first"
    assert 2 <= len(requests) <= 2 * 2 * 2, "equal questions are asked once"
    assert {row["stage"] for row in results["tables"]["losses"]} == {"1", "2"}
    assert results["metrics"]["clip + clip.relative"] == 100


def test_on_the_world_answers_are_marked_and_a_run_that_is_done_is_not_trained_again(folders, tmp_path, monkeypatch):
    from vaelab.probing.reasoning import study

    monkeypatch.chdir(ROOT)
    params = chosen(
        folders, "llama", streams=["clip", "clip + clip", "clip + untrained:up_ft0.t25", "noise", "none"],
        resolution=64, max_images=3, test_images=2, test_splits=["test"], batch_size=16, shown_questions=2,
    )  # fmt: skip
    folder = tmp_path / "run"
    names = execute_cells("44_visual_reasoning", *KINDS, output_dir=str(folder), **params)
    results = json.loads((folder / "results.json").read_text())
    assert {row["stream"] for row in results["tables"]["accuracy"]} == set(params["streams"])
    assert [row["layer"] for row in results["tables"]["layers"]] == ["untrained:up_ft0.t25"]
    assert (folder / "accuracy.png").is_file() and (folder / "examples.png").is_file()
    assert "clip + clip" in results["finding"] and len(results["key_numbers"]) >= 2
    monkeypatch.setattr(study, "train_stage", lambda *given, **options: pytest.fail("trained again"))
    again, _ = study.answer_streams(
        params["streams"], [0], names["load_language"], names["lessons"], names["learned"], names["tested"],
        names["asked"], names["config"], folder / "trainings", settings=names["settings"],
    )  # fmt: skip
    assert again == names["answers"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"streams": ["clip + clip", "clip + up_ft9.t25"]}, "streams: unknown name 'up_ft9'"),
        ({"streams": ["clip + clip", "clap"]}, "streams: 'clap' of 'clap' is no part"),
        ({"baseline": "clip"}, "baseline: unknown name 'clip'"),
        ({"dataset": "coco"}, "dataset: unknown name 'coco'"),
        ({"language_model": "{mpt}"}, "language_model: .* has no chat template; give chat_template: llava or chatml"),
        ({"image_encoder": "{mpt}"}, "image_encoder: .* holds a mpt model; expected CLIP, DINOv2"),
        ({"test_splits": ["validation"]}, "test_splits: unknown name 'validation'"),
        ({"dataset": "llava", "captions": "no.json"}, "captions: 'no.json' is no file"),
        ({"warmup_ratio": 1.5}, "warmup_ratio: expected a share below 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_parameters_are_refused_before_any_work(folders, tmp_path, monkeypatch, params, message):
    from vaelab import models

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(models, "load_pipeline", lambda *given, **options: pytest.fail("the pipeline was loaded"))
    given = {name: folders["mpt"] if value == "{mpt}" else value for name, value in params.items()}
    params = {**chosen(folders, "llama", max_images=2, test_images=1), **given}
    with pytest.raises(ValueError, match=f"^{message}"):
        execute_cells("44_visual_reasoning", "load", output_dir=str(tmp_path / "run"), **params)


def test_a_dry_run_estimates_and_trains_nothing(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    params = chosen(folders, "llama", resolution=64, max_images=30, test_images=1, dry_run=True)
    execute_cells("44_visual_reasoning", *KINDS, output_dir=str(tmp_path / "run"), **params)
    printed = capsys.readouterr().out
    assert "2 x stage 1, captions" in printed and "2 x stage 2, instructions" in printed
    assert not (tmp_path / "run" / "trainings").exists()
