"""The checkout of a walk, and the shell in it."""

from __future__ import annotations

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
    lines = [f"Note {number}: squirrels hid {number * 7} nuts below the oak." for number in range(400)]
    for number, start in enumerate(range(0, 400, 10)):
        (folder / f"note_{number}.txt").write_text("\n".join(lines[start : start + 10]))
    (folder / "web.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines[::5]))
    (folder / "more" / "program.py").write_text("print('squirrel')\n")
    (folder / "more" / "empty.txt").touch()
    (folder / "picture.png").write_bytes(bytes(range(256)))
    return folder
