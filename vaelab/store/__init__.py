"""Activations on disk: written shard by shard, resumed after an interruption, and read back in shuffled batches."""

from vaelab.store.format import BlockShape, Layout
from vaelab.store.planning import Plan, plan
from vaelab.store.reader import Store, open
from vaelab.store.shuffling import shuffle_stream
from vaelab.store.writer import Writer, create

__all__ = ["BlockShape", "Layout", "Plan", "Store", "Writer", "create", "open", "plan", "shuffle_stream"]
