"""What a run trains on: one stream of packs from tokenised corpora, which goes on from a small state."""

from megatron_m1.data.stream.by_index import IndexedPacks, Stretch
from megatron_m1.data.stream.caps import check_max_epochs
from megatron_m1.data.stream.plan import PackPlan
from megatron_m1.data.stream.stream import Stream, StreamConfig, StreamCounts, open_stream

__all__ = [
    "IndexedPacks",
    "PackPlan",
    "Stream",
    "StreamConfig",
    "StreamCounts",
    "Stretch",
    "check_max_epochs",
    "open_stream",
]
