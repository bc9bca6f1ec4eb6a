import pandas as pd
import pytest
import torch

from vaelab.bench import store


@pytest.mark.parametrize("system", store.SYSTEMS)
def test_every_system_gives_back_every_vector_once_and_shuffled(tmp_path, system, monkeypatch):
    if system == "webdataset":
        pytest.importorskip("webdataset")
    monkeypatch.setattr(store, "SAMPLES_IN_BUFFER", 5)
    maps = torch.arange(75 * 2 * 256.0).reshape(75, 256, 2).mT.reshape(75, 2, 16, 16) % 2039
    maps[:, 1] = torch.arange(75)[:, None, None]
    write, read = store.SYSTEMS[system]
    write(tmp_path, [part.clone() for part in maps.half().split(store.TOGETHER)])
    batches = list(read(tmp_path, 1000, 0))
    rows = torch.cat(batches)
    expected = maps.permute(0, 2, 3, 1).reshape(-1, 2)
    assert all(batch.dtype == torch.float32 and len(batch) <= 1000 for batch in batches)
    assert sorted(rows.tolist()) == sorted(expected.tolist())
    assert not torch.equal(rows, expected)
    assert len(set(batches[0][:, 1].tolist())) > 20


def test_the_systems_are_timed_in_turns(tmp_path):
    table = store.store_seconds(tmp_path, systems=("store", "arrow"), vectors=600, width=8, rounds=2)
    assert sorted(zip(table["round"], table["system"], strict=True)) == [
        (number, system) for number in (0, 1) for system in ("arrow", "store")
    ]
    assert (table[["write", "read"]] > 0).all().all() and (table["vectors"] == 768).all()
    assert not list(tmp_path.iterdir())


def test_a_system_that_loses_vectors_is_found_out(tmp_path, monkeypatch):
    write, read = store.SYSTEMS["store"]
    monkeypatch.setitem(store.SYSTEMS, "store", (write, lambda *args: list(read(*args))[1:]))
    with pytest.raises(RuntimeError, match="systems: store read back 512 of 768 vectors"):
        store.store_seconds(tmp_path, systems=["store"], vectors=768, width=8, batch_size=256)


@pytest.mark.parametrize(
    "options", [{"vectors": 0}, {"width": 0}, {"batch_size": 0}, {"rounds": 0}, {"systems": ["tar"]}]
)
def test_what_cannot_be_timed_is_refused(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}:"):
        store.store_seconds(**options)


def test_ratios_of_a_planted_table():
    table = pd.DataFrame(
        [("store", 1.0, 2.0), ("store", 1.2, 2.0), ("arrow", 2.2, 8.0), ("arrow", 2.2, 8.0)],
        columns=["system", "write", "read"],
    ).assign(vectors=1000)
    found = store.speed_ratios(table)
    assert found == pytest.approx(
        {"store.shuffled_vectors_per_second": 500, "store.read_vs_arrow": 4, "store.write_vs_arrow": 2}
    )
