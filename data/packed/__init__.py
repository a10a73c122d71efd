"""From tokenised corpora to packs."""

from megatron_m1.data.packed.dataset import PackedDataset, build_packed_dataset
from megatron_m1.data.packed.sample import DocumentPiece, PackedSample, Packs, pad_pack

__all__ = ["DocumentPiece", "PackedDataset", "PackedSample", "Packs", "build_packed_dataset", "pad_pack"]
