import shutil

import pytest
import torch
from collecting import COUNT, LAYOUT, fill, truth

from vaelab import store
from vaelab.store import format, planning
from vaelab.store.format import BlockShape


def test_a_plan_has_the_size_of_the_papers_collection():
    told = store.plan({"down.2.1": BlockShape((16, 16), 1280)}, 1_500_000, seconds_per_item=0.8)
    assert told.rows == {"down.2.1": 384_000_000} and told.bytes == {"down.2.1": 983_040_000_000}
    assert told.seconds == 1_200_000
    text = str(told)
    for part in ("1,500,000 items", "384,000,000 rows", "983 GB", "13 days, 21:20:00", "0.8 s an item"):
        assert part in text


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_a_plan_is_what_is_then_written(tmp_path, precision):
    told = store.plan(LAYOUT, COUNT, precision)
    fill(tmp_path, truth(dtype=getattr(torch, precision)), precision=precision)
    sizes = {
        block: sum(path.stat().st_size - format.HEADER for path in tmp_path.glob(f"*.{block.replace('/', '_')}.safe*"))
        for block in LAYOUT
    }
    assert told.bytes == sizes and told.total_bytes == sum(sizes.values())
    assert told.rows == {block: store.open(tmp_path).rows(block) for block in LAYOUT}
    assert told.seconds is None and "not known" in str(told)


def test_a_plan_says_whether_the_disk_has_room(tmp_path, monkeypatch):
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 4 * 10**8))
    layout = {"a": BlockShape((10, 10), 1000)}
    for count, verdict in ((1000, "enough"), (3000, "NOT ENOUGH")):
        told = str(store.plan(layout, count, folder=tmp_path / "not" / "there"))
        assert told.splitlines()[3].split() == ["free", "disk", "400", "MB", *verdict.split()]
    with pytest.raises(ValueError, match="items: must be at least 0"):
        store.plan(layout, -1)
