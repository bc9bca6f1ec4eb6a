"""Collections: what is stored is what the denoiser gave, however often the collection was killed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vaelab import activations, store
from vaelab.activations import collect
from vaelab.activations.collect import CollectConfig
from vaelab.activations.denoiser import Sampling

BLOCKS = ("down.1.0", "mid.0")
PROMPTS = [f"a thing number {i}" for i in range(7)]
CONFIG = CollectConfig(BLOCKS, Sampling(steps=2), batch_size=3, items_per_shard=4, seed=5, precision="float32")


@pytest.fixture(scope="module")
def pipeline(small_pipeline):
    return small_pipeline("sdxl")


def collected(pipeline, folder, config=CONFIG, prompts=PROMPTS, **options):
    layout, per_prompt, _ = collect.probe(pipeline, prompts, config)
    return collect.collect(
        pipeline, prompts, config, folder, layout=layout, items_per_prompt=per_prompt, progress=False, **options
    )


def test_every_row_is_what_the_denoiser_gave(pipeline, tmp_path):
    kept = collected(pipeline, tmp_path / "store")
    assert kept.complete and len(kept.items) == len(PROMPTS) * 2
    for number, prompt in enumerate(PROMPTS):
        alone = activations.from_prompts(pipeline, [prompt], [5 + number], BLOCKS, CONFIG.sampling)
        for step in (0, 1):
            item = kept.items[2 * number + step]
            assert (item["prompt"], item["seed"], item["step"], item["guided"]) == (prompt, 5 + number, step, True)
            assert item["timestep"] == float(pipeline.scheduler.timesteps[step])
            for block in BLOCKS:
                stored = kept.maps(block, [2 * number + step])
                torch.testing.assert_close(stored, alone.maps[block][step], rtol=1e-4, atol=1e-5)


def test_every_pass_of_a_sampler_that_takes_more_than_its_steps_is_an_item(small_pipeline, tmp_path):
    kept = collected(small_pipeline("sd"), tmp_path / "store", replace(CONFIG, blocks=("mid.0",)), PROMPTS[:2])
    assert [item["step"] for item in kept.items] == [0, 1, 2] * 2
    assert len({item["timestep"] for item in kept.items}) == 2  # PNDM passes twice at its first timestep but one


def test_both_halves_are_items_of_their_own(pipeline, tmp_path):
    kept = collected(pipeline, tmp_path / "store", replace(CONFIG, halves="both", steps=(1,)))
    assert [item["guided"] for item in kept.items[:4]] == [True, False, True, False]
    both = activations.from_prompts(pipeline, PROMPTS[:1], [5], "mid.0", CONFIG.sampling, steps=[1])
    torch.testing.assert_close(kept.maps("mid.0", [0]), both.maps["mid.0"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept.maps("mid.0", [1]), both.unguided["mid.0"][0], rtol=1e-4, atol=1e-5)


def test_streaming_gives_the_rows_that_would_be_stored(pipeline, tmp_path):
    kept = collected(pipeline, tmp_path / "store")
    rows = torch.cat(list(collect.vectors(pipeline, PROMPTS, CONFIG, "mid.0")))
    stored = kept.maps("mid.0", range(len(kept.items))).flatten(0, 2)
    torch.testing.assert_close(rows, stored)
    mixed = torch.cat(list(store.shuffle_stream(rows.split(50), 32, seed=0, buffer_rows=200)))
    assert not torch.equal(mixed, rows)
    torch.testing.assert_close(mixed.sum(0), rows.sum(0), rtol=1e-3, atol=1e-3)
    assert len(mixed) == len(rows)


def test_other_prompts_or_settings_do_not_go_on_with_a_store(pipeline, tmp_path):
    collected(pipeline, tmp_path / "store")
    with pytest.raises(ValueError, match="prompts_sha256"):
        collected(pipeline, tmp_path / "store", prompts=[*PROMPTS[:-1], "another"])
    with pytest.raises(ValueError, match="seed"):
        collected(pipeline, tmp_path / "store", replace(CONFIG, seed=6))


def test_a_finished_collection_is_not_made_again(pipeline, tmp_path, monkeypatch):
    first = collected(pipeline, tmp_path / "store")
    layout, per_prompt = first.layout, 2
    monkeypatch.setattr(collect, "captures", lambda *_, **__: pytest.fail("computed again"))
    again = collect.collect(
        pipeline, PROMPTS, CONFIG, tmp_path / "store", layout=layout, items_per_prompt=per_prompt, progress=False
    )
    assert len(again.items) == len(first.items)


def test_summary_of_a_planted_store(tmp_path):
    constant = torch.ones(4, 2, 2, 3)
    per_item = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 2, 2, 3) - 1.5
    layout = {name: store.BlockShape((2, 2), 3) for name in ("constant", "per item")}
    with store.create(tmp_path / "store", layout, precision="float32") as writer:
        writer.add(
            {"constant": constant, "per item": per_item},
            [{"prompt": str(i), "seed": i, "timestep": 0} for i in range(4)],
        )
    table = collect.summary(store.open(tmp_path / "store")).set_index("block")
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
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_killed_ten_times_it_has_every_row_once(pipeline_folder, tmp_path):
    script = Path(__file__).parent / "collect_killed.py"
    command = [sys.executable, str(script), str(pipeline_folder("sdxl")), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[-1]) >= 3
    killed, undisturbed = (store.open(tmp_path / name) for name in ("killed", "undisturbed"))
    killed.verify()
    assert killed.items[:] == undisturbed.items[:]
    for block in BLOCKS:
        every = range(len(undisturbed.items))
        # not bit by bit: what a matrix product's last bit is depends on where its operands lie in memory
        torch.testing.assert_close(killed.maps(block, every), undisturbed.maps(block, every), rtol=1e-4, atol=1e-5)
