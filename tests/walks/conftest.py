"""The checkout of a walk, and the shell in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.walks.checkout import Checkout, Shell


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """One for all tests of a file, which come one after another."""
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def shell(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(checkout, capsys)


@pytest.fixture(scope="module")
def own_texts(checkout: Checkout) -> Path:
    """A folder as people have them: text, JSON Lines, source, a picture and an empty file."""
    folder = checkout.folder / "texts"
    (folder / "more").mkdir(parents=True)
    paragraphs = [text for text in (checkout.folder / "README.md").read_text().split("\n\n") if len(text) > 40]
    for number, text in enumerate(paragraphs[::2]):
        (folder / f"note_{number}.txt").write_text(text)
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs[1::2]))
    (folder / "more" / "program.py").write_text("print('squirrel')\n")
    (folder / "more" / "empty.txt").touch()
    (folder / "picture.png").write_bytes(bytes(range(256)))
    return folder
