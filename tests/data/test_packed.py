"""Packs against the documents they were made of: every token is unique, so the truth is a look-up."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_m1.data.packed import PackedDataset, PackedSample, build_packed_dataset, pad_pack
from megatron_m1.runtime.pool import WorkerPool
from tests.checkpoint.checkpoint_runs import file_size_limit
from tests.data.corpora import FakeTokenizer, unique_documents, write_corpus

LENGTHS = [1, 5, 1, 1, 13, 2, 31, 7, 7, 1, 3, 40, 6, 9, 1, 22, 4, 16]


def build(blend: list[str], folder: Path, **changes: object) -> PackedDataset:
    options = {"sequence_length": 7, "num_samples": 20, "seed": 5, "tokenizer": FakeTokenizer()}
    return build_packed_dataset(blend, cache_folder=folder / "cache", **(options | changes))  # type: ignore[arg-type]


def same(a: PackedSample, b: PackedSample) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "labels", "loss_mask", "cu_seqlens")
    )


def check_against_documents(sample: PackedSample, documents: list[list[int]]) -> None:
    """Rebuild bounds and mask of a pack from where its (unique) tokens lie in their documents."""
    home = {token: (d, p) for d, document in enumerate(documents) for p, token in enumerate(document)}
    tokens, labels = sample.tokens.tolist(), sample.labels.tolist()
    n = len(tokens)
    assert labels[:-1] == tokens[1:]
    opens = [home[label][1] == 0 for label in labels]
    follows = [home[b] == (home[a][0], home[a][1] + 1) for a, b in zip(tokens, labels, strict=True)]
    assert [o or f for o, f in zip(opens, follows, strict=True)] == [True] * n
    assert sample.loss_mask.tolist() == [0.0 if o else 1.0 for o in opens]
    assert sample.cu_seqlens.tolist() == [0] + [i + 1 for i in range(n - 1) if opens[i]] + [n]
    assert (sample.tokens.dtype, sample.labels.dtype) == (torch.int64, torch.int64)
    assert (sample.loss_mask.dtype, sample.cu_seqlens.dtype) == (torch.float32, torch.int32)


@pytest.mark.parametrize("corpora", [1, 3])
@pytest.mark.parametrize("length", [2, 7, 64])
def test_the_pieces_say_where_every_token_is_from(tmp_path: Path, length: int, corpora: int) -> None:
    """Several passes over one corpus and over a blend, with empty documents."""
    lengths = [*LENGTHS[:6], 0, *LENGTHS[6:], 0]
    corpus = {}
    for number in range(corpora):
        documents = unique_documents(lengths, first_id=1000 * number, eod=None)
        corpus[write_corpus(tmp_path / f"c{number}", documents)] = documents
    dataset = build(list(corpus), tmp_path, sequence_length=length, num_samples=200)
    named = set()
    for index in range(200):
        pack, pieces = dataset[index], dataset.pieces(index)
        assert [0, *(piece.end for piece in pieces)] == pack.cu_seqlens.tolist()
        assert [piece.start for piece in pieces] == pack.cu_seqlens[:-1].tolist()
        for piece in pieces:
            document = corpus[piece.corpus][piece.document]
            whole = document[piece.offset : piece.offset + piece.end - piece.start]
            assert pack.tokens[piece.start : piece.end].tolist() == whole
            named.add(piece.corpus)
    assert named == set(corpus)
    with pytest.raises(IndexError, match="pack 200 of 200"):
        dataset.pieces(200)


@pytest.mark.parametrize("length", [2, 3, 7, 16, 64])
def test_packs_are_the_documents_end_to_end(tmp_path: Path, length: int) -> None:
    documents = unique_documents(LENGTHS, eod=None)
    prefix = write_corpus(tmp_path / "c", documents)
    one_pass = (sum(LENGTHS) - 1) // length
    dataset = build([prefix], tmp_path, sequence_length=length, num_samples=one_pass)
    packs = [dataset[i] for i in range(one_pass)]
    for pack in packs:
        check_against_documents(pack, documents)
    # One pass holds every token once, but for the tail that fills no pack.
    seen = torch.cat([pack.tokens for pack in packs]).tolist()
    assert len(set(seen)) == len(seen) == one_pass * length


def test_the_hard_bounds_occur(tmp_path: Path) -> None:
    """The corpus above has: a label alone in the next document, one-token documents at both ends of a pack."""
    documents = unique_documents(LENGTHS, eod=None)
    prefix = write_corpus(tmp_path / "c", documents)
    dataset = build([prefix], tmp_path, sequence_length=3, num_samples=170)
    packs = [dataset[i] for i in range(170)]
    singles = {document[0] for document in documents if len(document) == 1}
    assert any(pack.loss_mask[-1] == 0 for pack in packs)
    assert any(pack.loss_mask[-1] == 0 and int(pack.labels[-1]) in singles for pack in packs)
    assert any(int(pack.tokens[0]) in singles for pack in packs)
    assert any(int(pack.tokens[-1]) in singles for pack in packs)
    assert all(pack.cu_seqlens.diff().min() > 0 for pack in packs)


def test_only_the_next_document_is_masked_with_end_marks(tmp_path: Path) -> None:
    """Inside a document the end mark is no bound, and predicting it is scored."""
    documents = [[9, 1, 8, 1], [7, 6, 1], [5, 1]] * 5
    prefix = write_corpus(tmp_path / "c", documents)
    dataset = build([prefix], tmp_path, sequence_length=4, num_samples=8)
    for i in range(8):
        pack = dataset[i]
        scored = pack.labels[pack.loss_mask > 0].tolist()
        assert not set(scored) & {9, 7, 5}
        masked = pack.labels[pack.loss_mask == 0].tolist()
        assert set(masked) <= {9, 7, 5}


def test_flow_through_documents(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", unique_documents(LENGTHS))
    reset, flow = build([prefix], tmp_path), build([prefix], tmp_path, reset_at_documents=False)
    for i in range(20):
        assert torch.equal(reset[i].tokens, flow[i].tokens)
        assert flow[i].cu_seqlens.tolist() == [0, 7]
        assert flow[i].loss_mask.tolist() == [1.0] * 7


def test_reading_twice_and_in_any_order_gives_the_same(tmp_path: Path) -> None:
    """GPTDataset caches one mask for all packs; ours must not leak into it."""
    documents = unique_documents(LENGTHS, eod=None)
    prefix = write_corpus(tmp_path / "c", documents)
    forward, backward = build([prefix], tmp_path), build([prefix], tmp_path)
    first = [forward[i] for i in range(20)]
    last = [backward[i] for i in reversed(range(20))][::-1]
    assert all(same(a, b) for a, b in zip(first, last, strict=True))
    assert all(same(a, forward[i]) for i, a in enumerate(first))


def test_blend_follows_the_weights(tmp_path: Path) -> None:
    low = write_corpus(tmp_path / "low", unique_documents([11] * 40))
    high = write_corpus(tmp_path / "high", unique_documents([11] * 40, first_id=10_000))
    dataset = build(["0.7", low, "0.3", high], tmp_path, num_samples=100)
    from_high = [bool(dataset[i].tokens.max() >= 10_000) for i in range(100)]
    assert sum(from_high) == 30
    # Shares hold all along the run, not only at its end.
    assert max(abs(sum(from_high[:k]) - 0.3 * k) for k in range(1, 101)) <= 1.0


def test_blend_without_weights_goes_by_tokens(tmp_path: Path) -> None:
    small = write_corpus(tmp_path / "small", unique_documents([10] * 20))
    large = write_corpus(tmp_path / "large", unique_documents([10] * 60, first_id=10_000))
    dataset = build([small, large], tmp_path, num_samples=40)
    assert sum(bool(dataset[i].tokens.max() >= 10_000) for i in range(40)) == 30


@pytest.mark.parametrize("samples", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("weights", [(0.9, 0.1), (1.0, 1.0), (97.0, 1.0)])
def test_any_number_of_packs_from_a_small_blend(tmp_path: Path, samples: int, weights: tuple[float, float]) -> None:
    """Rounding of the shares must not ask a corpus for more packs than it was built with."""
    prefixes = [write_corpus(tmp_path / str(k), unique_documents([4, 3], first_id=2 + 7 * k)) for k in range(2)]
    blend = list(itertools.chain.from_iterable(zip(map(str, weights), prefixes, strict=True)))
    dataset = build(blend, tmp_path, num_samples=samples)
    assert len([dataset[i] for i in range(samples)]) == len(dataset) == samples
    with pytest.raises(IndexError):
        dataset[samples]


def test_corpus_shorter_than_a_pack_is_repeated(tmp_path: Path) -> None:
    documents = unique_documents([3, 2], eod=None)
    prefix = write_corpus(tmp_path / "c", documents)
    dataset = build([prefix], tmp_path, sequence_length=32, num_samples=4)
    for i in range(4):
        check_against_documents(dataset[i], documents)


@pytest.mark.parametrize("empty", [1, 40])
def test_empty_documents_leave_no_trace(tmp_path: Path, empty: int) -> None:
    """There may be more of them in a pack than it has tokens."""
    documents = [part for document in unique_documents(LENGTHS, eod=None) for part in (*[[]] * empty, document, [])]
    dataset = build([write_corpus(tmp_path / "c", documents)], tmp_path)
    for i in range(20):
        check_against_documents(dataset[i], [document for document in documents if document])


def test_order_depends_on_seed_and_not_on_the_cache(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", unique_documents(LENGTHS, eod=None))
    base, again, cold = build([prefix], tmp_path), build([prefix], tmp_path), build([prefix], tmp_path / "other")
    other = build([prefix], tmp_path, seed=6)
    assert all(same(base[i], again[i]) and same(base[i], cold[i]) for i in range(20))
    assert not all(same(base[i], other[i]) for i in range(20))


def test_corpus_made_anew_is_not_read_through_old_indices(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", unique_documents([30, 30]))
    build([str(tmp_path / "c")], tmp_path)
    documents = unique_documents([2] * 30, eod=None)
    write_corpus(tmp_path / "c", documents)
    dataset = build([str(tmp_path / "c")], tmp_path)
    for i in range(20):
        check_against_documents(dataset[i], documents)


def test_indices_of_a_killed_build_are_made_again(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", unique_documents(LENGTHS))
    first = build([prefix], tmp_path)
    expected = [first[i] for i in range(20)]
    (mark,) = (tmp_path / "cache").glob("*/complete")
    mark.unlink()
    for index in mark.parent.rglob("*.npy"):
        os.truncate(index, 40)
    again = build([prefix], tmp_path)
    assert all(same(again[i], expected[i]) for i in range(20))
    assert mark.exists()
    assert not list((tmp_path / "cache").glob("*.lock"))


def tokens_on_rank(rank: int, world_size: int, blend: list[str], cache: str) -> list[list[int]]:
    dataset = build_packed_dataset(
        blend, sequence_length=7, num_samples=20, seed=5, tokenizer=FakeTokenizer(), cache_folder=cache
    )
    return [dataset[i].tokens.tolist() for i in range(20)]


@pytest.mark.parametrize("sources", [1, 2])
def test_ranks_build_together(tmp_path: Path, workers: WorkerPool, sources: int) -> None:
    prefixes = [
        write_corpus(tmp_path / str(k), unique_documents(LENGTHS, first_id=500 * k + 2)) for k in range(sources)
    ]
    blend = [item for prefix in prefixes for item in ("1", prefix)]
    shared = workers.run(tokens_on_rank, blend, str(tmp_path / "cache"), world_size=2)
    alone = tokens_on_rank(0, 1, blend, str(tmp_path / "alone"))
    assert shared == [alone, alone]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sequence_length": 1}, "sequence_length is 1"), ({"num_samples": 0}, "num_samples is 0")],
)
def test_bad_numbers(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    prefix = write_corpus(tmp_path / "c", unique_documents([4]))
    with pytest.raises(ValueError, match=message):
        build([prefix], tmp_path, **changes)


@pytest.mark.parametrize("eod", [-1, 60])
def test_an_end_mark_beyond_the_vocabulary(tmp_path: Path, eod: int) -> None:
    prefix = write_corpus(tmp_path / "c", unique_documents([4]))
    with pytest.raises(ValueError, match=f"ends documents with id {eod} but has ids below 60"):
        build([prefix], tmp_path, tokenizer=FakeTokenizer(60, eod))


def test_large_ids_survive(tmp_path: Path) -> None:
    """uint16 ids up to 65,535 are no negative numbers, and id 0 is not taken for padding."""
    prefix = write_corpus(tmp_path / "c", [[0, 65_535, 0, 40_000, 1]] * 4)
    dataset = build([prefix], tmp_path, sequence_length=5, num_samples=3)
    for i in range(3):
        assert sorted(dataset[i].tokens.tolist()) == [0, 0, 1, 40_000, 65_535]
        assert np.isclose(dataset[i].loss_mask.sum().item(), 4.0)


@pytest.mark.parametrize("again", ["same", "winding", "linked"])
def test_a_corpus_named_twice_gives_no_pack_twice(tmp_path: Path, again: str) -> None:
    """Two datasets of one corpus have one order, so that each pack would come once for each name."""
    prefix = write_corpus(tmp_path / "c", unique_documents(LENGTHS, eod=None))
    (tmp_path / "link").symlink_to(tmp_path)
    spelling = {"same": prefix, "winding": f"{tmp_path}/../{tmp_path.name}/c", "linked": str(tmp_path / "link/c")}[
        again
    ]
    alone = build([prefix], tmp_path, num_samples=8)
    blend = build(["0.25", prefix, "0.75", spelling], tmp_path, num_samples=8)
    for index in range(8):
        assert same(alone[index], blend[index])


@pytest.mark.parametrize("in_the_way", [True, False])
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, in_the_way: bool) -> None:
    """A file where the folder belongs; a limit on file sizes in place of a full disk."""
    blend = [write_corpus(tmp_path / "a", unique_documents(LENGTHS))]
    if in_the_way:
        (tmp_path / "cache").write_text("")
    message = rf"^the sample indices in {tmp_path}/cache can't be written: .*; make room or choose another data.cache_f"
    with file_size_limit(10), pytest.raises(ValueError, match=message):
        build(blend, tmp_path)


def pack_with_extra() -> PackedSample:
    extra = {"weights": torch.tensor([0.5, 0.25, 1.0]), "pairs": torch.arange(6).view(3, 2)}
    tokens = torch.tensor([5, 6, 7])
    return PackedSample(tokens, tokens, torch.ones(3), torch.tensor([0, 3], dtype=torch.int32), extra, {"pairs": -1})


def test_further_tensors_are_padded_like_tokens_each_with_its_value() -> None:
    padded = pad_pack(pack_with_extra(), 5)
    assert padded.tokens.tolist() == [5, 6, 7, 0, 0]
    assert padded.loss_mask.tolist() == [1, 1, 1, 0, 0]
    assert padded.cu_seqlens.tolist() == [0, 3, 5]
    assert padded.extra["weights"].tolist() == [0.5, 0.25, 1.0, 0.0, 0.0]
    assert padded.extra["pairs"].tolist() == [[0, 1], [2, 3], [4, 5], [-1, -1], [-1, -1]]
    assert padded.extra["pairs"].dtype == torch.int64
    assert pad_pack(padded, 5) is padded
    assert (padded.real_tokens, pad_pack(padded, 8).real_tokens) == (3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": {"weights": torch.ones(2)}, "padding": {}}, r"extra\['weights'\] has shape \[2\], .* 3 tokens"),
        ({"extra": {"weights": torch.ones(())}, "padding": {}}, r"extra\['weights'\] has shape \[\], .* 3 tokens"),
        ({"padding": {"pears": 1.0}}, r"padding names 'pears', .* \['pairs', 'weights'\]"),
    ],
)
def test_further_tensors_that_fit_no_token(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pad_pack(dataclasses.replace(pack_with_extra(), **changes), 3)
    assert "\n" not in str(caught.value)


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self._marker,)


def test_indices_with_a_pickle_are_made_again(tmp_path: Path) -> None:
    """A run's folder may come from elsewhere. megatron-core allows pickles in it, by what unpickles anything."""
    prefix, marker = write_corpus(tmp_path / "c", unique_documents(LENGTHS)), tmp_path / "marker"
    first = build([prefix], tmp_path)
    expected = [first[i] for i in range(20)]
    payload = io.BytesIO()
    torch.save(_Touch(marker), payload)
    indices = list((tmp_path / "cache").rglob("*.npy"))
    for index in indices:
        np.save(index, np.array([_Nested(payload.getvalue())], dtype=object), allow_pickle=True)
    again = build([prefix], tmp_path)
    assert indices and all(same(again[i], expected[i]) for i in range(20))
    assert not marker.exists()


class _Nested:
    """Unpickled, it calls what megatron-core's unpickler allows."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return torch.storage._load_from_bytes, (self._content,)


@pytest.mark.parametrize("reset", [True, False])
def test_a_loss_mask_beside_the_corpus_masks_labels(tmp_path: Path, reset: bool) -> None:
    """Over several passes and with empty documents; ids count from 2 on, so that each label tells its byte."""
    documents = unique_documents([*LENGTHS[:6], 0, *LENGTHS[6:], 0, 0], eod=None)
    prefix = write_corpus(tmp_path / "c", documents)
    plain = build([prefix], tmp_path, num_samples=60, reset_at_documents=reset)
    samples = [plain[index] for index in range(60)]
    learnt = np.random.default_rng(3).integers(0, 2, sum(LENGTHS)).astype(np.uint8)
    Path(f"{prefix}.loss").write_bytes(learnt.tobytes())
    masked = build([prefix], tmp_path, num_samples=60, reset_at_documents=reset)
    for index, sample in enumerate(samples):
        said = torch.from_numpy(learnt[sample.labels.numpy() - 2]).float()
        assert torch.equal(masked[index].loss_mask, sample.loss_mask * said)
        assert torch.equal(masked[index].labels, sample.labels)
    Path(f"{prefix}.loss").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"c\.loss has 1 bytes"):
        build([prefix], tmp_path)
