from dataclasses import replace
from itertools import islice

import pytest
import torch

from vaelab import store
from vaelab.collect import CollectConfig, vectors
from vaelab.configs import TrainConfig
from vaelab.denoise import Sampling
from vaelab.planted import Planted
from vaelab.sae import SAEConfig
from vaelab.sae_batches import from_store, streaming
from vaelab.sae_training import Wanted, train_saes

PLANTED = Planted(d=32, n_features=48, active=2, length=30.0)


def written(folder, items=60):
    layout = {name: store.BlockShape((4, 4), 32) for name in ("mid.0", "up.0.1")}
    with store.create(folder, layout, items_per_shard=20) as writer:
        for number in range(items):
            maps = {
                name: PLANTED.vectors(16, number + at).view(1, 4, 4, 32) for at, name in ((0, "mid.0"), (999, "up.0.1"))
            }
            writer.add(maps, [{"prompt": str(number), "seed": number, "timestep": 1}])
    return store.open(folder)


def test_several_blocks_of_a_store_in_one_pass(tmp_path):
    kept = written(tmp_path)
    saes = {f"{block}-k{k}": Wanted(block, SAEConfig(32, 64, k)) for block in kept.layout for k in (2, 4)}
    config = TrainConfig(steps=20, learning_rate=0.01, clip_norm=0.0, log_every=20, device="cpu")
    trained = train_saes(saes, from_store(kept, ["mid.0", "up.0.1"], 96, seed=0), config)
    last = trained.history[trained.history["step"] == 20].set_index("sae")
    assert list(last.index) == list(saes)
    assert (last["l0"] == [2, 4, 2, 4]).all() and (last["explained_variance"] > 0.3).all()
    first = next(from_store(kept, ["mid.0"], 96, seed=0)(start=3))
    again = next(islice(from_store(kept, ["mid.0"], 96, seed=0)(), 3, None))
    assert list(first) == ["mid.0"] and torch.equal(first["mid.0"], again["mid.0"])


def test_an_empty_store_and_an_unknown_block_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^activations: .*empty holds no item"):
        from_store(written(tmp_path / "empty", items=0), ["mid.0"], 8, seed=0)
    kept = written(tmp_path / "few", items=4)
    with pytest.raises(ValueError, match=r"^vectors: must be at least 1, got 0"):
        from_store(kept, ["mid.0"], 0, seed=0)
    with pytest.raises(ValueError, match=r"block: unknown name 'mid\.1'.*mid\.0"):
        from_store(kept, ["mid.1"], 8, seed=0)


DRAWN = CollectConfig(("mid.0", "down.2.1"), Sampling(steps=2, guidance_scale=0.0), batch_size=2)


def test_streamed_batches_hold_the_vectors_that_are_drawn_and_go_on_where_asked(small_pipeline):
    pipeline, prompts = small_pipeline("sdxl"), ["a dog", "two cats", "a tree"]
    batches = streaming(pipeline, prompts, DRAWN, batch_size=6, buffer_rows=10, seed=0)
    found = list(islice(batches(), 7))
    drawn = {block: torch.cat(list(vectors(pipeline, prompts, DRAWN, block))).float() for block in DRAWN.blocks}
    places = []
    for batch in found:
        assert list(batch) == list(DRAWN.blocks)
        same = [(batch[block][:, None] - drawn[block]).abs().sum(2) < 1e-6 for block in batch]
        assert torch.equal(same[0], same[1])  # the two blocks' vectors of one place come together
        places += same[0].nonzero()[:, 1].tolist()
    assert len(places) > 20 and len(set(places)) == len(places)
    again = next(batches(start=3))
    assert all(torch.equal(again[block], found[3][block]) for block in again)
    second = next(batches(start=1, rank=1, world=2))
    assert torch.equal(second["mid.0"], found[3]["mid.0"])


def test_what_cannot_be_streamed_is_refused(small_pipeline):
    with pytest.raises(ValueError, match="prompts: none"):
        streaming(small_pipeline("sdxl"), [], DRAWN, batch_size=6, buffer_rows=10, seed=0)
    uneven = replace(DRAWN, blocks=("mid.0", "up.1.0"))
    with pytest.raises(ValueError, match="blocks: expected maps of one size"):
        next(streaming(small_pipeline("sdxl"), ["a"], uneven, batch_size=6, buffer_rows=10, seed=0)())
