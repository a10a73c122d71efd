"""From tokenised corpora to packs."""

from megatron_m1.data.packed.dataset import PackedDataset, build_packed_dataset
from megatron_m1.data.packed.sample import DocumentPiece, PackedSample, pad_pack

__all__ = ["DocumentPiece", "PackedDataset", "PackedSample", "build_packed_dataset", "pad_pack"]
