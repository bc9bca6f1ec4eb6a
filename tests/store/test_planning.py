import shutil

import pytest
import torch
from collecting import COUNT, LAYOUT, fill, truth

from vaelab import store
from vaelab.core import disk
from vaelab.store import format
from vaelab.store.format import BlockShape


def test_plan_of_the_papers_collection():
    plan = store.plan({"down.2.1": BlockShape((16, 16), 1280)}, 1_500_000, seconds_per_item=0.8)
    assert plan.rows == {"down.2.1": 384_000_000} and plan.bytes == {"down.2.1": 983_040_000_000}
    assert plan.seconds == 1_200_000
    text = str(plan)
    for part in ("1,500,000 items", "384,000,000 rows", "983 GB", "13 days, 21:20:00", "0.8 s an item"):
        assert part in text


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_a_plan_equals_what_is_written(tmp_path, precision):
    plan = store.plan(LAYOUT, COUNT, precision)
    fill(tmp_path, truth(dtype=getattr(torch, precision)), precision=precision)
    sizes = {
        block: sum(
            path.stat().st_size - format.HEADER_BYTES for path in tmp_path.glob(f"*.{block.replace('/', '_')}.safe*")
        )
        for block in LAYOUT
    }
    assert plan.bytes == sizes and plan.total_bytes == sum(sizes.values())
    assert plan.rows == {block: store.open(tmp_path).rows(block) for block in LAYOUT}
    assert plan.seconds is None and "unknown" in str(plan)


def test_a_plan_compares_with_the_free_disk_space(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 4 * 10**8))
    layout = {"a": BlockShape((10, 10), 1000)}
    for count, verdict in ((1000, "enough"), (3000, "NOT ENOUGH")):
        plan = str(store.plan(layout, count, folder=tmp_path / "not" / "there"))
        assert plan.splitlines()[3].split() == ["free", "disk", "400", "MB", *verdict.split()]
    with pytest.raises(ValueError, match="items: must be at least 0"):
        store.plan(layout, -1)


def test_what_the_disk_cannot_hold_is_refused_and_what_is_stored_counts(tmp_path, monkeypatch):
    fill(tmp_path / "store")
    stored = sum(path.stat().st_size for path in (tmp_path / "store").glob("*.safetensors"))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 50_000))
    layout = {"a": BlockShape((10, 10), 1000)}
    plan = store.plan(layout, 1, folder=tmp_path, memory=3 * 10**9)
    assert not plan.fits and "3 GB" in str(plan).splitlines()[4]
    with pytest.raises(ValueError, match=r"^output_dir: the store needs 200 kB more, and the disk has 50 kB free"):
        plan.require_disk_space()
    resumed = store.plan({"a": BlockShape((), stored // 2 + 20_000)}, 1, folder=tmp_path / "store")
    assert resumed.stored == stored and resumed.fits
    resumed.require_disk_space()
    store.plan(layout, 10**6).require_disk_space()  # no folder, no limit
