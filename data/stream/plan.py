"""What a pack will hold, known from the lengths of documents alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_m1.data.packed import DocumentPiece


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces of documents, none empty: the tokens ``starts`` to ``ends - 1`` of ``documents``, int64 [pieces] each."""

    documents: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.documents)

    @classmethod
    def of(cls, pieces: list[tuple[int, int, int]]) -> Pieces:
        """From (document, start, end)."""
        columns = np.array(pieces, np.int64).reshape(-1, 3).T
        return cls(*columns)

    @classmethod
    def joined(cls, parts: list[Pieces]) -> Pieces:
        """Parts one after another."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.documents for part in parts]),
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.ends for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class Filling:
    """What a packer puts into one pack of one source."""

    pieces: Pieces
    """End to end; only the last may end before its document does."""
    following: tuple[int, int] | None
    """Document and offset of the token after the last piece's last, which is its label; None if there is none."""

    @property
    def is_cut(self) -> bool:
        """Whether the last piece's document goes on."""
        return self.following == (int(self.pieces.documents[-1]), int(self.pieces.ends[-1]))


@dataclass(frozen=True, eq=False)
class PackPlan:
    """One pack of the stream, not read yet."""

    source: int
    """Index of its corpus among the stream's prefixes."""
    corpus: str
    """Its prefix."""
    filling: Filling
    length: int
    """Tokens of the pack, padding among them."""

    @property
    def tokens(self) -> int:
        """Tokens of documents; what is left of the pack's length pads its end."""
        return int((self.filling.pieces.ends - self.filling.pieces.starts).sum())

    @property
    def pieces(self) -> list[DocumentPiece]:
        """Which documents it has, in their order in the pack."""
        found = self.filling.pieces
        bounds = np.cumsum(found.ends - found.starts).tolist()
        places = zip(found.documents.tolist(), found.starts.tolist(), [0, *bounds[:-1]], bounds, strict=True)
        return [DocumentPiece(self.corpus, *place) for place in places]
