"""How long the operations of an expert layer take on GPUs: figures with their sources, and a model of bytes and FLOPs.

Nothing here is measured by this project. Ranks are taken to be alike (experts that are loaded evenly).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.parallel.expert.schedule import Kind, Lane, Operation, schedule
from megatron_m1.parallel.expert.simulate import Shape, run_ranks

NODE = 8
"""GPUs of a node, joined by NVLink."""
TILE = 128
"""Rows to which the products of each expert are rounded up."""


@dataclass(frozen=True)
class Processor:
    """A GPU."""

    name: str
    flops: float
    """Peak of dense bf16 products, a second."""
    memory: float
    """Bytes a second."""
    efficiency: float
    """Share of the peak that grouped products reach (assumed)."""


@dataclass(frozen=True)
class Network:
    """Between GPUs: bytes a second of one GPU's messages in each direction, and seconds before the first byte."""

    name: str
    inside: float
    """Within a node."""
    inside_latency: float
    outside: float
    """Between nodes."""
    outside_latency: float


GPU = Processor("H800 or H100 SXM", 989e12, 3.35e12, 0.6)
_H800 = (155e9, 15e-6)
_H100 = (320e9, 15e-6)
NETWORKS = (
    Network("H100, 400 Gb/s InfiniBand a GPU", *_H100, 46e9, 30e-6),
    Network("H800, 400 Gb/s InfiniBand a GPU", *_H800, 46e9, 30e-6),
    Network("H800, 100 Gb/s Ethernet a GPU", *_H800, 11.5e9, 60e-6),
    Network("H800, 100 Gb/s Ethernet a node", *_H800, 11.5e9 / NODE, 60e-6),
)
SOURCES = (
    ("peak", "989 TFLOP/s dense bf16, 3.35 TB/s, H800 as H100", "deepseek-ai/FlashMLA issue 75 and its deep dive"),
    (
        "efficiency",
        "0.6 of the peak in grouped bf16 products",
        "assumed; DeepGEMM's grouped FP8 products reach 0.56 to 0.70 of theirs on H800 (deepseek-ai/DeepGEMM PR 74)",
    ),
    (
        "NVLink, H800",
        "155 GB/s of 200 each way (400 GB/s in both)",
        "DeepEP's README: 153 and 158 GB/s for dispatch and combine, 8 ranks",
    ),
    (
        "NVLink, H100",
        "320 GB/s of 450 each way (900 GB/s in both)",
        "README of a DeepEP port, 8 ranks on H200, which has the same NVLink: 320 and 319 GB/s",
    ),
    (
        "InfiniBand",
        "46 GB/s of 50; an all-to-all has one card a rank",
        "NVIDIA/nccl-tests issues 290 (46 to 48) and 267; DeepEP's README: 43 to 58",
    ),
    ("Ethernet", "11.5 GB/s of 12.5, the same share as InfiniBand's", "assumed"),
    ("latency", "15 us NVLink, 30 us InfiniBand, 60 us Ethernet", "assumed; the sweep goes from 10 us to 1 ms"),
    ("host", "10 us a call of torch, 40 us a collective", "assumed; other values are in a table of their own"),
)


@dataclass(frozen=True)
class Layer:
    """One MoE layer on its ranks."""

    expert_ranks: int
    tensor_ranks: int
    tokens: int = 8192
    """Of each rank."""
    hidden: int = 6144
    ffn: int = 9216
    experts: int = 32
    topk: int = 2
    recompute: bool = False

    @property
    def pairs(self) -> int:
        """Rows that a rank sends, and receives."""
        return self.tokens * self.topk

    @property
    def held(self) -> int:
        """Experts of a rank."""
        return self.experts // self.expert_ranks

    @property
    def weights(self) -> float:
        """Of a rank's experts, in numbers."""
        return self.held * 3 * self.hidden * self.ffn / self.tensor_ranks

    def outside(self) -> float:
        """Share of an all-to-all's rows that leave the node. ETP ranks are neighbours, in one node."""
        near = min(NODE // self.tensor_ranks, self.expert_ranks)
        return (self.expert_ranks - near) / self.expert_ranks

    def inside(self) -> float:
        """Share that goes to other ranks of the node."""
        return 1 - self.outside() - 1 / self.expert_ranks


@dataclass(frozen=True)
class Host:
    """What issuing takes, seconds."""

    call: float = 10e-6
    collective: float = 40e-6


CALLS = {
    Kind.SEND_SCALES: 2,
    Kind.SHARE_SCALES: 2,
    Kind.DISPATCH: 2,
    Kind.GATHER: 2,
    Kind.EXPERTS: 10,
    Kind.REDUCE: 1,
    Kind.COMBINE: 1,
    Kind.COLLECT: 2,
    Kind.WEIGHTS: 3,
}
"""Calls of torch, with grouped products, without the collective; EXPERTS makes twice as many in the backward pass."""


@dataclass(frozen=True)
class Costs:
    """Seconds of every operation, forward or backward, with the layer's tokens in ``groups``."""

    layer: Layer
    network: Network
    groups: int
    backward: bool
    processor: Processor = GPU
    host: Host = Host()
    fused_totals: bool = False
    """Products add to the weights' float32 gradients themselves, which ``kernels.matmul.matmul_add_`` does not do."""

    def _rows(self) -> float:
        return self.layer.pairs / self.groups

    def _copy(self, rows: float, width: float, times: int = 2) -> float:
        """Of bf16 rows through memory: read and written."""
        return rows * width * 2 * times / self.processor.memory

    def _all_to_all(self, row_bytes: float) -> float:
        layer, net, size = self.layer, self.network, self._rows() * row_bytes
        within = net.inside_latency + layer.inside() * size / net.inside
        beyond = net.outside_latency + layer.outside() * size / net.outside if layer.outside() else 0.0
        return max(within, beyond)

    def _shards(self, row_bytes: float) -> float:
        """A gather or reduce-scatter over ETP."""
        return (
            self.network.inside_latency + self._rows() * row_bytes * (self.layer.tensor_ranks - 1) / self.network.inside
        )

    def _products(self, memory_bytes: float) -> float:
        """One pass through all matrices: bound by the processor or by its memory."""
        layer = self.layer
        rows = self._rows() * layer.tensor_ranks
        # What tiles add where an expert has few rows.
        rounded = -(-rows / layer.held // TILE) * TILE * layer.held
        flops = rounded * 2 * 3 * layer.hidden * layer.ffn / layer.tensor_ranks
        return max(flops / self.processor.flops / self.processor.efficiency, memory_bytes / self.processor.memory)

    def _experts(self) -> float:
        layer = self.layer
        rows, inner = self._rows() * layer.tensor_ranks, layer.ffn / layer.tensor_ranks
        passes = 2 if self.backward and layer.recompute else 1
        # Read what arrived in its order, and lay what is sent back; activations are read and written once, fused.
        seconds = 2 * self._copy(rows, layer.hidden) + self._copy(rows, inner, 9 if self.backward else 3)
        # The matrices are read; with recomputation, the first of both products is made again.
        seconds += self._products(2 * layer.weights + 4 * rows * (layer.hidden + 1.5 * inner))
        return seconds + (2 / 3 * self._products(0.0) if passes == 2 else 0.0)

    def _weight_gradients(self) -> float:
        weights, memory = self.layer.weights, self.processor.memory
        if self.groups == 1:
            return self._products(2 * weights)
        if self.fused_totals:
            return self._products(8 * weights)
        # A product in bf16, which is then read and added to the totals.
        return self._products(2 * weights) + 10 * weights / memory

    def duration(self, operation: Operation) -> float:
        """Seconds in its lane."""
        layer, kind = self.layer, operation.kind
        width = 2 * layer.hidden if self.backward and layer.recompute else layer.hidden
        # Forward, shards' results are added up, and sent back, in float32.
        back = layer.hidden * (4 if layer.tensor_ranks > 1 and not self.backward else 2)
        rows = self._rows()
        return {
            Kind.SEND_SCALES: lambda: self._all_to_all(4 * self.groups),
            Kind.SHARE_SCALES: lambda: self._shards(4 * self.groups),
            Kind.DISPATCH: lambda: self._copy(rows, width) + self._all_to_all(2 * width),
            Kind.GATHER: lambda: self._shards(2 * width),
            Kind.EXPERTS: self._experts,
            Kind.REDUCE: lambda: self._shards(back),
            Kind.COMBINE: lambda: self._all_to_all(back),
            Kind.COLLECT: lambda: self._copy(rows, layer.hidden, 3),
            Kind.WEIGHTS: self._weight_gradients,
        }[kind]()

    def run(self, expert_ranks: int, tensor_ranks: int) -> list[float]:
        """When every rank has ended this pass, seconds, on as many ranks."""
        ranks = run_ranks(
            Shape(self.groups, expert_ranks, tensor_ranks, self.backward),
            lambda _, operation: self.duration(operation),
            issue=lambda _, operation: self.issue(operation),
        )
        return [max(span.ended for span in spans.values()) for spans in ranks]

    def issue(self, operation: Operation) -> float:
        """Seconds of the process."""
        calls = CALLS[operation.kind] * (2 if self.backward and operation.kind is Kind.EXPERTS else 1)
        travels = operation.lane is not Lane.COMPUTE
        return calls * self.host.call + travels * self.host.collective


@dataclass(frozen=True)
class Times:
    """Of a layer's forward and backward pass, seconds."""

    total: float
    products: float
    """All that is computed, without groups."""
    travel: float
    """All messages one after the other, without groups."""

    @property
    def hidden(self) -> float:
        """Share of the messages' time that the layer does not take beyond its products; 0 where nothing overlaps."""
        return 1 - (self.total - self.products) / self.travel

    @property
    def speedup(self) -> float:
        """Over a layer in which nothing overlaps."""
        return (self.products + self.travel) / self.total


def layer_times(
    layer: Layer, network: Network, groups: int, *, host: Host | None = None, fused_totals: bool = False
) -> Times:
    """Run the lists that train, forward and backward.

    Ranks that are alike do the same at the same time, so two a process group stand for all of them.
    """
    pace = Host() if host is None else host
    total, sums = 0.0, dict.fromkeys(Lane, 0.0)
    e, t = (min(size, 2) for size in (layer.expert_ranks, layer.tensor_ranks))
    for backward in (False, True):
        total += Costs(layer, network, groups, backward, GPU, pace, fused_totals).run(e, t)[0]
        whole = Costs(layer, network, 1, backward, GPU, pace)
        for operation in schedule(1, e, t, backward=backward):
            sums[operation.lane] += whole.duration(operation)
    return Times(total, sums[Lane.COMPUTE], sums[Lane.EXPERT] + sums[Lane.TENSOR])
