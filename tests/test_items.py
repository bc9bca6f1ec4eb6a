import pytest
from collecting import COUNT, captures, damage

from vaelab import store


def test_items_come_in_the_order_asked_for(url):
    items = store.open(url).items
    assert len(items) == COUNT
    assert items[-1] == captures()[-1] and items[2:9:3] == captures()[2:9:3]
    with pytest.raises(IndexError):
        items[COUNT]


@pytest.mark.parametrize("text", [b"[]", b"[{}]]]", b""])
def test_items_that_change_while_the_store_is_open_are_named(url, text):
    opened = store.open(url)
    damage(url, "shard-00001.items.json", lambda data: text)
    assert opened.items[2] == captures()[2]
    with pytest.raises(ValueError, match=r"shard-00001.items.json was changed since it was written"):
        opened.describe("up.0", 10)
