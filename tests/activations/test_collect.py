from dataclasses import replace

import collect_killed
import pytest
import torch
from helpers import CHILDREN

from vaelab import activations, store
from vaelab.activations import collect, denoiser
from vaelab.activations.collect import CollectConfig
from vaelab.activations.denoiser import Sampling

BLOCKS = ("down.1.0", "mid.0")
PROMPTS = [f"a thing number {i}" for i in range(7)]
CONFIG = CollectConfig(BLOCKS, Sampling(steps=2), batch_size=3, items_per_shard=4, seed=5, precision="float32")


@pytest.fixture(scope="module")
def pipeline(small_pipeline):
    return small_pipeline("sdxl")


def collected(pipeline, folder, config=CONFIG, prompts=PROMPTS, **options):
    layout, per_prompt, _ = collect.run_trial_batch(pipeline, prompts, config)
    return collect.collect_prompts(
        pipeline, prompts, config, folder, layout=layout, items_per_prompt=per_prompt, progress=False, **options
    )


def test_every_stored_row_is_what_the_denoiser_gave(pipeline, tmp_path):
    features = collected(pipeline, tmp_path / "store")
    assert features.complete and len(features.items) == len(PROMPTS) * 2
    for number, prompt in enumerate(PROMPTS):
        alone = activations.from_prompts(pipeline, [prompt], [5 + number], BLOCKS, CONFIG.sampling)
        for step in (0, 1):
            item = features.items[2 * number + step]
            assert (item["prompt"], item["seed"], item["step"], item["guided"]) == (prompt, 5 + number, step, True)
            assert item["timestep"] == float(pipeline.scheduler.timesteps[step])
            for block in BLOCKS:
                stored = features.maps(block, [2 * number + step])
                torch.testing.assert_close(stored, alone.maps[block][step], rtol=1e-4, atol=1e-5)


def test_every_pass_of_a_sampler_that_takes_more_than_its_steps_is_an_item(small_pipeline, tmp_path):
    features = collected(small_pipeline("sd"), tmp_path / "store", replace(CONFIG, blocks=("mid.0",)), PROMPTS[:2])
    assert [item["step"] for item in features.items] == [0, 1, 2] * 2
    assert len({item["timestep"] for item in features.items}) == 2  # PNDM passes twice at its first timestep but one


def test_both_halves_of_the_guidance_are_items(pipeline, tmp_path):
    features = collected(pipeline, tmp_path / "store", replace(CONFIG, halves="both", steps=(1,)))
    assert [item["guided"] for item in features.items[:4]] == [True, False, True, False]
    both = activations.from_prompts(pipeline, PROMPTS[:1], [5], "mid.0", CONFIG.sampling, steps=[1])
    torch.testing.assert_close(features.maps("mid.0", [0]), both.maps["mid.0"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.maps("mid.0", [1]), both.unguided["mid.0"][0], rtol=1e-4, atol=1e-5)


def test_streaming_gives_the_rows_that_would_be_stored(pipeline, tmp_path):
    features = collected(pipeline, tmp_path / "store")
    rows = torch.cat(list(collect.stream_rows(pipeline, PROMPTS, CONFIG, "mid.0")))
    stored = features.maps("mid.0", range(len(features.items))).flatten(0, 2)
    torch.testing.assert_close(rows, stored)
    mixed = torch.cat(list(store.shuffle_stream(rows.split(50), 32, seed=0, buffer_rows=200)))
    assert not torch.equal(mixed, rows)
    torch.testing.assert_close(mixed.sum(0), rows.sum(0), rtol=1e-3, atol=1e-3)
    assert len(mixed) == len(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [*PROMPTS[:-1], "another"]}, "settings prompts_sha256"),
        ({"rows": range(1, 8)}, "settings prompts_sha256"),
        ({"config": replace(CONFIG, seed=6)}, "settings seed 5 there, 6 here"),
        ({"config": replace(CONFIG, side="output")}, "settings side 'update' there, 'output' here"),
        ({"config": replace(CONFIG, precision="float16")}, "precision 'float32' there, 'float16' here"),
        ({"settings": {"identity": {"commit": "b"}}}, "settings identity {'commit': 'a'} there, {'commit': 'b'} here"),
    ],
)
def test_a_store_of_other_prompts_or_settings_is_not_resumed(pipeline, tmp_path, change, message):
    collected(pipeline, tmp_path / "store", **({"settings": {"identity": {"commit": "a"}}}))
    with pytest.raises(ValueError, match=message):
        collected(pipeline, tmp_path / "store", **({"settings": {"identity": {"commit": "a"}}} | change))


def test_a_store_of_another_precision_or_scheduler_of_the_pipeline_is_not_resumed(small_pipeline, tmp_path):
    pipeline = small_pipeline("sdxl")
    collected(pipeline, tmp_path / "store", prompts=PROMPTS[:1])
    with pytest.raises(ValueError, match="settings model_precision 'float32' there, 'bfloat16' here"):
        collected(pipeline.to(torch.bfloat16), tmp_path / "store", prompts=PROMPTS[:1])
    pipeline.to(torch.float32)
    before = pipeline.scheduler
    try:
        pipeline.scheduler = type(before).from_config(before.config, beta_end=0.02)
        with pytest.raises(ValueError, match="settings scheduler_sha256"):
            collected(pipeline, tmp_path / "store", prompts=PROMPTS[:1])
    finally:
        pipeline.scheduler = before


@pytest.mark.parametrize(("batch_size", "per_shard"), [(1, 3), (2, 3), (4, 100)])
def test_a_collection_resumes_with_other_sizes_after_running_out_of_memory(
    pipeline, tmp_path, monkeypatch, capsys, batch_size, per_shard
):
    whole = collected(pipeline, tmp_path / "whole", replace(CONFIG, items_per_shard=3))
    from_prompts, calls = denoiser.from_prompts, []

    def out_of_memory(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the trial batch takes two
            raise torch.OutOfMemoryError
        return from_prompts(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(denoiser, "from_prompts", out_of_memory)
        collected(pipeline, tmp_path / "store", replace(CONFIG, items_per_shard=3))
    assert len(store.open(tmp_path / "store").items) == 6  # 3 prompts of 2 steps were whole shards of 3 items
    resumed = collected(pipeline, tmp_path / "store", replace(CONFIG, batch_size=batch_size, items_per_shard=per_shard))
    assert ("keeps its shards of 3 items" in capsys.readouterr().out) == (per_shard != 3)
    resumed.verify()
    assert resumed.complete and resumed.items[:] == whole.items[:]
    for block in BLOCKS:
        every = range(len(whole.items))
        torch.testing.assert_close(resumed.maps(block, every), whole.maps(block, every), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_shard", [5, 7])
def test_a_store_that_ends_within_a_prompt_is_resumed_there(pipeline, tmp_path, monkeypatch, per_shard):
    config = replace(CONFIG, items_per_shard=per_shard, batch_size=2)
    whole = collected(pipeline, tmp_path / "whole", config)
    add, calls = store.Writer.add, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        add(self, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(store.Writer, "add", killed)
        collected(pipeline, tmp_path / "store", config)
    assert len(store.open(tmp_path / "store").items) == 12 // per_shard * per_shard
    resumed = collected(pipeline, tmp_path / "store", config)
    assert resumed.items[:] == whole.items[:]
    for block in BLOCKS:  # the same batches, and so the same numbers to the last bit
        every = range(len(whole.items))
        assert torch.equal(resumed.maps(block, every), whole.maps(block, every))


def test_a_complete_collection_is_used_as_it_is(pipeline, tmp_path, monkeypatch):
    first = collected(pipeline, tmp_path / "store")

    def state():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "store").iterdir()}

    before = state()
    layout, per_prompt = first.layout, 2
    monkeypatch.setattr(collect, "capture_batches", lambda *_, **__: pytest.fail("computed again"))
    again = collect.collect_prompts(
        pipeline, PROMPTS, CONFIG, tmp_path / "store", layout=layout, items_per_prompt=per_prompt, progress=False
    )
    assert len(again.items) == len(first.items) and state() == before


def test_summary_of_a_planted_store(tmp_path):
    constant = torch.ones(4, 2, 2, 3)
    per_item = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 2, 2, 3) - 1.5
    layout = {name: store.BlockShape((2, 2), 3) for name in ("constant", "per item")}
    with store.create(tmp_path / "store", layout, precision="float32") as writer:
        writer.add(
            {"constant": constant, "per item": per_item},
            [{"prompt": str(i), "seed": i, "timestep": 0} for i in range(4)],
        )
    table = collect.summarize_blocks(store.open(tmp_path / "store")).set_index("block")
    assert table.loc["constant", "mean_share"] == pytest.approx(1)
    assert table.loc["constant", "norm"] == pytest.approx(3**0.5)
    assert table.loc["per item", "between_prompts"] == pytest.approx(1)
    assert table.loc["per item", "mean_share"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": ()}, "blocks"),
        ({"blocks": ("mid.0", "mid.0")}, "blocks"),
        ({"side": "middle"}, "side"),
        ({"halves": "none"}, "halves"),
        ({"steps": (0, 0)}, "capture_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"precision": "float8"}, "^stored_precision: unknown name 'float8'"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_a_collection_killed_ten_times_has_every_row_once(pipeline_folder, tmp_path):
    process = CHILDREN.Process(
        target=collect_killed.collect_and_kill, args=(str(pipeline_folder("sdxl")), str(tmp_path))
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert int((tmp_path / "kills").read_text()) >= 3
    killed, undisturbed = (store.open(tmp_path / name) for name in ("killed", "undisturbed"))
    killed.verify()
    assert killed.items[:] == undisturbed.items[:]
    for block in BLOCKS:
        every = range(len(undisturbed.items))
        # not bit by bit: what a matrix product's last bit is depends on where its operands lie in memory
        torch.testing.assert_close(killed.maps(block, every), undisturbed.maps(block, every), rtol=1e-4, atol=1e-5)
