"""Hugging Face tokenizer folders without ``tokenizer.json``: which of their files is taken for what."""

from __future__ import annotations

from typing import Any

from megatron_m1.data.tokenizers.hf_folder import FILE, TokenizerFolder, first_line
from megatron_m1.data.tokenizers.token_ids import FastIds, PythonIds, SentencePieceIds, TokenIds

_CLASSES = {("vocab.json", "merges.txt"): "GPT2Tokenizer", ("vocab.txt",): "BertTokenizer"}
"""transformers' class for files that come without the name of one."""
_OF_BYTES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
"""Its classes that need no vocabulary."""


def older_ids(folder: TokenizerFolder, notes: list[str]) -> tuple[TokenIds, int]:
    """Load a folder that has no ``tokenizer.json``, and add a line to ``notes`` that says how.

    Returns:
        The tokenizer, and the id that ends documents.

    Raises:
        ValueError: it needs code of its own, which is never run, can't be loaded, or nothing ends documents; one line.
    """
    if folder.own_code is not None:
        raise ValueError(
            f"{folder.path} has no {FILE}, and its tokenizer is code of its own ({folder.own_code}), which is never"
            f" run: save it as {FILE} where you trust that code"
        )
    return _by_sentencepiece(folder, notes) or _by_transformers(folder, notes)


def _by_sentencepiece(folder: TokenizerFolder, notes: list[str]) -> tuple[TokenIds, int] | None:
    """What SentencePiece itself makes of ``tokenizer.model``, if that file has all tokens of the folder."""
    if folder.vocabulary_files() != ["tokenizer.model"]:
        return None
    try:
        ids = SentencePieceIds(folder.contents["tokenizer.model"])
    except RuntimeError:
        return None  # it may be of another kind that transformers knows
    model = ids.processor

    def has(text: str) -> bool:
        return model.id_to_piece(model.piece_to_id(text)) == text

    marks = [token.content for token in (*folder.marks(), *folder.extra_marks())]
    declared = [(token.content, number) for token, number in folder.declared_tokens()]
    if not all(map(has, marks)) or not all(has(text) and model.piece_to_id(text) == i for text, i in declared):
        return None
    end = model.eos_id() if folder.end_mark is None else model.piece_to_id(folder.end_mark)
    if end < 0:
        raise ValueError(_no_end(folder))
    notes.append(
        f"{folder.path} has no {FILE}: its ids are taken to be those that SentencePiece gives its tokenizer.model"
    )
    return ids, int(end)


def _by_transformers(folder: TokenizerFolder, notes: list[str]) -> tuple[TokenIds, int]:
    # Importing transformers takes seconds, which only those who use such a folder should wait.
    import transformers

    files = folder.vocabulary_files()
    if set(files) <= {"tekken.json"} and folder.config.get("tokenizer_class") not in _OF_BYTES:
        raise ValueError(
            f"{folder.path} has no {FILE}, vocab or .model ({', '.join(folder.contents)} can't be used alone): fetch "
            "the folder again, or give another"
        )
    guess = next((name for known, name in _CLASSES.items() if sorted(known) == sorted(files)), None)
    loader = transformers.AutoTokenizer if folder.names_class or guess is None else getattr(transformers, guess)
    try:
        tokenizer: Any = loader.from_pretrained(str(folder.path), local_files_only=True, trust_remote_code=False)
        end = tokenizer.eos_token_id if folder.end_mark is not None or folder.end_id is None else folder.end_id
        ids = FastIds(tokenizer.backend_tokenizer) if tokenizer.is_fast else PythonIds(tokenizer)
    except Exception as error:  # its loaders raise nearly anything
        raise ValueError(f"{folder.path} holds no tokenizer that transformers can load: {first_line(error)}") from error
    if end is None or not 0 <= end < ids.size:
        raise ValueError(_no_end(folder))
    # transformers makes up a row for a mark that the vocabulary lacks, which no embedding has.
    if tokenizer.is_fast and end == tokenizer.eos_token_id:
        known = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        if tokenizer.eos_token not in {*known, *(token.content for token, _ in folder.declared_tokens())}:
            raise ValueError(
                f"{folder.path}: eos_token {tokenizer.eos_token!r} is no token of {' and '.join(files)}, so nothing can"
                " end documents: name one that is in its tokenizer_config.json"
            )
    notes.append(
        f"{folder.path} has no {FILE}: taken to be what transformers {transformers.__version__} makes of"
        f" {' and '.join(files) or 'no vocabulary'} as {type(tokenizer).__name__}"
    )
    return ids, int(end)


def _no_end(folder: TokenizerFolder) -> str:
    return f"{folder.path} has no eos_token to end documents with; set one in its tokenizer_config.json"
