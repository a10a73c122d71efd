"""The stream of packs: the same global batches on every mesh, and exactly continued after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_m1.data.packed import DocumentPiece, PackedDataset, PackedSample, build_packed_dataset
from megatron_m1.data.packed.loader import PackedLoader
from tests.data.corpora import FakeTokenizer, unique_documents, write_corpus


class NumberedPacks:
    """Pack i of pass p holds the number 1000 p + i."""

    def __init__(self, length: int, index: int) -> None:
        self.length, self.index = length, index

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> PackedSample:
        assert 0 <= index < self.length
        number = torch.tensor([1000 * self.index + index])
        return PackedSample(number, number, torch.ones(1), torch.tensor([0, 1], dtype=torch.int32))

    def pieces(self, index: int) -> list[DocumentPiece]:
        return [DocumentPiece(f"pass {self.index}", index, 0, 0, 1)]


def numbers(loader: PackedLoader, consumed: int) -> list[int]:
    return [int(sample.tokens) for sample in loader.microbatches(consumed)]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_global_batch_does_not_depend_on_the_mesh(size: int) -> None:
    loaders = [
        PackedLoader(NumberedPacks(30, 0), global_batch_size=6, data_parallel_rank=rank, data_parallel_size=size)
        for rank in range(size)
    ]
    for step in range(5):
        by_rank = [numbers(loader, 6 * step) for loader in loaders]
        assert [by_rank[rank][m] for m in range(6 // size) for rank in range(size)] == list(
            range(6 * step, 6 * step + 6)
        )
        assert all(len(batch) == loader.num_microbatches for batch, loader in zip(by_rank, loaders, strict=True))


def test_resume_on_another_mesh_and_batch_size_goes_on() -> None:
    """Stopped after 3 steps of 4 packs on 2 ranks, then 6 packs a step on 3 ranks: nothing is lost or repeated."""

    def run(size: int, batch: int, start: int, steps: int) -> list[int]:
        packs = NumberedPacks(40, 0)
        ranks = [
            PackedLoader(packs, global_batch_size=batch, data_parallel_rank=r, data_parallel_size=size)
            for r in range(size)
        ]
        return sorted(x for step in range(steps) for rank in ranks for x in numbers(rank, start + batch * step))

    assert run(2, 4, 0, 3) + run(3, 6, 12, 4) == list(range(36))


def test_passes_follow_each_other_and_are_made_on_every_rank() -> None:
    """10 packs a pass, 4 a step: the third step takes from two passes, and every rank makes both."""
    made: list[list[int]] = [[], [], [], []]

    def loader_of(rank: int) -> PackedLoader:
        def next_pass(index: int) -> NumberedPacks:
            made[rank].append(index)
            return NumberedPacks(10, index)

        return PackedLoader(
            NumberedPacks(10, 0),
            global_batch_size=4,
            data_parallel_rank=rank,
            data_parallel_size=4,
            next_pass=next_pass,
        )

    loaders = [loader_of(rank) for rank in range(4)]
    stream = [x for step in range(8) for loader in loaders for x in numbers(loader, 4 * step)]
    assert stream == [1000 * p + i for p in range(4) for i in range(10)][:32]
    assert made == [[1, 2, 3]] * 4
    # A restart in the middle of the third pass, by a loader that never saw the first two.
    fresh = [loader_of(rank) for rank in range(4)]
    assert [numbers(loader, 24)[0] for loader in fresh] == stream[24:28]


def test_a_batch_of_many_passes() -> None:
    loader = PackedLoader(
        NumberedPacks(3, 0),
        global_batch_size=8,
        data_parallel_rank=0,
        data_parallel_size=1,
        next_pass=lambda index: NumberedPacks(3, index),
    )
    assert numbers(loader, 2) == [2, 1000, 1001, 1002, 2000, 2001, 2002, 3000]
    assert numbers(loader, 0) == [0, 1, 2, 1000, 1001, 1002, 2000, 2001]


def test_stream_of_a_real_corpus_continues_exactly(tmp_path: Path) -> None:
    """A run of one rank past the end of its data, and its restart on two, give the same packs."""
    prefix = write_corpus(tmp_path / "c", unique_documents([5, 9, 3, 14, 1, 8, 22, 6], eod=None))

    def packs(index: int) -> PackedDataset:
        return build_packed_dataset(
            [prefix],
            sequence_length=6,
            num_samples=9,
            seed=40 + index,
            tokenizer=FakeTokenizer(),
            cache_folder=tmp_path / "cache",
        )

    def loader(rank: int, size: int) -> PackedLoader:
        return PackedLoader(
            packs(0), global_batch_size=4, data_parallel_rank=rank, data_parallel_size=size, next_pass=packs
        )

    alone = loader(0, 1)
    whole = [sample.tokens.tolist() for step in range(6) for sample in alone.microbatches(4 * step)]
    pair = [loader(0, 2), loader(1, 2)]
    after = []
    for step in range(3, 6):
        batches = [rank.microbatches(4 * step) for rank in pair]
        after += [batches[rank][m].tokens.tolist() for m in range(2) for rank in range(2)]
    assert after == whole[12:]
    assert whole[:9] != whole[9:18], "a further pass has an order of its own"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((5, 0, 2), "global_batch_size 5"),
        ((4, 2, 2), "data_parallel_rank 2"),
        ((0, 0, 1), "global_batch_size 0"),
    ],
)
def test_bad_sizes(sizes: tuple[int, int, int], message: str) -> None:
    batch, rank, size = sizes
    with pytest.raises(ValueError, match=message):
        PackedLoader(NumberedPacks(8, 0), global_batch_size=batch, data_parallel_rank=rank, data_parallel_size=size)


def test_past_the_only_pass() -> None:
    loader = PackedLoader(NumberedPacks(6, 0), global_batch_size=4, data_parallel_rank=0, data_parallel_size=1)
    assert numbers(loader, 2) == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="packs 3 to 6 go past the 6 packs"):
        loader.microbatches(3)
    with pytest.raises(ValueError, match="consumed_samples is -1"):
        loader.microbatches(-1)


def test_pieces_are_those_of_the_micro_batches() -> None:
    """Also where a batch goes from one pass into the next."""
    for rank in range(2):
        loader = PackedLoader(
            NumberedPacks(6, 0),
            global_batch_size=4,
            data_parallel_rank=rank,
            data_parallel_size=2,
            next_pass=lambda index: NumberedPacks(6, index),
        )
        named = [(piece.corpus, piece.document) for (piece,) in loader.pieces(4)]
        assert named == [(f"pass {number // 1000}", number % 1000) for number in numbers(loader, 4)]
