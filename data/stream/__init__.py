"""What a run trains on: one stream of packs from tokenised corpora, which goes on from a small state."""

from megatron_m1.data.stream.plan import PackPlan
from megatron_m1.data.stream.stream import Stream, StreamConfig, StreamCounts, open_stream

__all__ = ["PackPlan", "Stream", "StreamConfig", "StreamCounts", "open_stream"]
