"""Rows that are no conversations, too long, or teach nothing: none is lost without a word."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_m1 import cli
from megatron_m1.data.chat.options import ChatOptions
from megatron_m1.data.corpora.loss_mask import loss_path, open_loss_mask
from megatron_m1.data.tokenize import tokenize_corpus
from megatron_m1.data.tokenize.buckets import parse_length_buckets
from megatron_m1.data.tokenize.report import TokenizeReport
from megatron_m1.data.tokenize.split import parse_split
from megatron_m1.data.tokenizers import load_tokenizer
from tests.data.chats import documents, m1_folder, m2_folder, said, tokenizer_folder, write_rows

GOOD = {"messages": [said("user", "Hello"), said("assistant", "He")]}
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<e>' }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""Knows no calls, no tools, and texts only."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("plain") / "t", ["<e>"], PLAIN, eos="<e>")


def run(
    folder: Path, tokenizer: Path, rows: list[Any], options: ChatOptions | None = None, **more: Any
) -> TokenizeReport:
    path = write_rows(folder / "chats.jsonl", rows)
    return tokenize_corpus([path], folder / "out", tokenizer, chat=options or ChatOptions(), **({"workers": 1} | more))


@pytest.mark.parametrize(
    ("messages", "detail"),
    [
        ([], "messages is [], not a list of messages"),
        ("x", "messages is 'x', not a list of messages"),
        (["x"], "message 1 is 'x', not an object"),
        ([said("human", "x")], "message 1 has the role 'human', not one of system, developer, user, assistant, tool"),
        ([said("user", 3)], "message 1 has a content that is 3, neither a text nor a list of parts"),
        ([said("user", [{"type": "image", "url": "x"}])], "message 1 has a part that is no text: "),
        ([said("user", "x", tool_calls=[{"name": "f"}])], "message 1 has tool_calls, which is the assistant's"),
        ([said("user", "x", thinking="y")], "message 1 has reasoning_content, which is the assistant's"),
        ([said("assistant", "x", reasoning_content=3)], "message 1 has a reasoning_content that is 3, not a text"),
        ([said("assistant", "x", tool_calls={"a": 1})], "message 1 has tool_calls that are {'a': 1}, not a list"),
        ([said("assistant", "x", tool_calls=[{"function": {}}])], "message 1 has a tool call without a name: "),
        (
            [said("assistant", "x", tool_calls=[{"name": "f", "arguments": "[1]"}])],
            "message 1 calls f with '[1]', not an",
        ),
    ],
)
def test_what_is_no_conversation_is_said(tmp_path: Path, plain: Path, messages: Any, detail: str) -> None:
    report = run(tmp_path, plain, [GOOD, {"messages": messages}])
    assert (report.documents, report.skipped) == (1, {"not a conversation": 1})
    assert report.details["not a conversation"].startswith(detail)
    assert f"the first not a conversation: {detail}" in str(report)


def test_rows_without_a_label_are_counted_and_a_file_of_them_is_refused(tmp_path: Path, plain: Path) -> None:
    empty = [said("user", "x"), said("assistant", None)]
    rows = [{"messages": [said("user", "x")]}, {"messages": empty}, {"text": "x"}, 3]
    with pytest.raises(ValueError, match="2 without anything to learn") as caught:
        run(tmp_path, plain, rows)
    assert '1 key missing (the first such record has "text")' in str(caught.value)
    assert "name its messages with --text-key" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]
    report = run(tmp_path, plain, [*rows, GOOD, {"messages": [*empty, *GOOD["messages"]]}])
    assert report.skipped == {"without anything to learn": 2, "key missing": 1, "not a JSON object": 1}
    assert report.remarks == {"empty turns of the assistant, which are not learnt": 1}
    # of either row that is kept: He, and the end mark
    assert [sum(loss) for _, loss in documents(tmp_path / "out")] == [2, 2]
    assert report.learnt == 4
    assert ", 4 of them learnt," in str(report)
    with pytest.raises(ValueError, match="say --chat if it holds conversations"):
        tokenize_corpus([write_rows(tmp_path / "c.jsonl", [GOOD])], tmp_path / "c", plain, workers=1)


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        (
            {"messages": [said("user", "x"), said("assistant", "", tool_calls=[{"name": "f"}])]},
            "the tool_calls of message 2",
        ),
        ({**GOOD, "tools": [{"type": "function", "function": {"name": "look"}}]}, "its tools (look among them)"),
    ],
)
def test_what_a_template_would_leave_out_is_said(tmp_path: Path, plain: Path, row: Any, detail: str) -> None:
    report = run(tmp_path, plain, [GOOD, row])
    assert report.skipped == {"left out in part by the chat template": 1}
    assert report.details == {"left out in part by the chat template": detail}


def test_a_template_that_drops_or_refuses_messages(tmp_path: Path) -> None:
    """MiniMax-M1's knows no developers and prints tools' names; another raises, or reaches for what it may not."""
    rows = [
        GOOD,
        {"messages": [said("developer", "Obey"), *GOOD["messages"]]},
        {"messages": [*GOOD["messages"], said("tool", "x"), said("assistant", "y")]},
    ]
    report = run(tmp_path, m1_folder(tmp_path / "m1"), rows)
    assert report.details == {
        "left out in part by the chat template": "message 1, of the developer: 'Obey'",
        "not a conversation": "message 3 is a tool's result without its name: give name, or the tool_call_id of its "
        "call",
    }
    for expression, why in (
        ("raise_exception('roles must alternate')", "roles must alternate"),
        ("messages.__class__.__mro__", "access to attribute '__class__' of 'list' object is unsafe."),
    ):
        (tmp_path / "t.jinja").write_text(
            PLAIN + "{% if messages[0].content == 'bad' %}{{ " + expression + " }}{% endif %}"
        )
        tokenizer = tokenizer_folder(tmp_path / "t", ["<e>"], None, eos="<e>")
        bad = {"messages": [said("user", "bad"), said("assistant", "x")]}
        report = run(tmp_path, tokenizer, [GOOD, bad], ChatOptions(tmp_path / "t.jinja"))
        assert report.details == {"refused by the chat template": why}


def test_a_conversation_longer_than_a_pack(tmp_path: Path, plain: Path) -> None:
    """Whole unless a length is given; cut or left out as is said, and counted; cut before its answer it is useless."""
    long = {
        "messages": [said("user", "Q" * 40), said("assistant", "A" * 60), said("user", "q"), said("assistant", "a")]
    }
    late = {"messages": [said("user", "Q" * 90), said("assistant", "A")]}
    rows = [GOOD, long, late]
    run(tmp_path, plain, rows)
    whole = documents(tmp_path / "out")
    assert [len(ids) for ids, _ in whole] == [24, 142, 111]
    assert sum(whole[1][1]) == 63, "60 letters and one, two end marks"

    report = run(tmp_path, plain, rows, ChatOptions(max_length=64, too_long="cut"))
    assert documents(tmp_path / "out") == [whole[0], (whole[1][0][:64], whole[1][1][:64])]
    assert report.remarks == {"documents cut to --max-length": 2, "tokens of them that are left out": 78 + 47}
    assert report.skipped == {"without anything to learn": 1}

    report = run(tmp_path, plain, rows, ChatOptions(max_length=111, too_long="drop"))
    assert documents(tmp_path / "out") == [whole[0], whole[2]]
    assert report.skipped == {"longer than --max-length": 1}
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert (sidecar["chat"]["max_length"], sidecar["chat"]["too_long"]) == (111, "drop")


def test_files_by_split_and_length_have_their_masks(tmp_path: Path) -> None:
    """The documents of a conversation, here one a turn, are on one side of the split, whoever tokenises."""
    tokenizer = m2_folder(tmp_path / "m2")
    rows = [
        {
            "messages": [
                said("user", f"Row {i}."),
                said("assistant", "A" * (i % 40), reasoning_content="Hm."),
                said("user", "Next"),
                said("assistant", "b"),
            ]
        }
        for i in range(60)
    ]
    options: dict[str, Any] = {"split": parse_split("1,1"), "buckets": parse_length_buckets("70")}
    found = []
    for workers in (1, 2):
        run(tmp_path, tokenizer, rows, workers=workers, **options)
        found.append({path.name: path.read_bytes() for path in sorted(tmp_path.glob("out*"))})
    assert found[0] == found[1]
    assert len(found[0]) == 16
    decode = load_tokenizer(tokenizer).decode
    sides = []
    for part in ("", "_validation"):
        names: set[str] = set()
        for bucket in ("_up_to_70", "_over_70"):
            prefix = tmp_path / f"out{bucket}{part}"
            read = documents(prefix)
            assert all((len(ids) > 70) == (bucket == "_over_70") for ids, _ in read)
            assert all(0 < sum(loss) < len(loss) for _, loss in read)
            learnt = json.loads(Path(f"{prefix}.json").read_text())["learnt_tokens"]
            assert learnt == sum(sum(loss) for _, loss in read)
            names |= {decode(ids).split("Row ")[1].split(".")[0] for ids, _ in read}
        sides.append(names)
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 60


def test_a_mask_belongs_to_its_corpus(tmp_path: Path, plain: Path) -> None:
    run(tmp_path, plain, [GOOD])
    prefix = str(tmp_path / "out")
    assert json.loads((tmp_path / "out.json").read_text())["loss_mask"] == "out.loss"
    loss = open_loss_mask(prefix, 24)
    assert isinstance(loss, np.memmap)
    assert loss.dtype == np.uint8
    with pytest.raises(ValueError, match=r"out\.loss has 24 bytes, its corpus 25 tokens, and needs a byte for each"):
        open_loss_mask(prefix, 25)
    loss_path(prefix).rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"out\.loss is missing, and .*out\.json names it"):
        open_loss_mask(prefix, 24)
    (tmp_path / "away").rename(loss_path(prefix))
    # Text of which all is learnt takes its place, mask and all.
    (tmp_path / "a.txt").write_text("text")
    tokenize_corpus([tmp_path / "a.txt"], prefix, plain, workers=1)
    assert open_loss_mask(prefix, 5) is None
    assert "loss_mask" not in json.loads((tmp_path / "out.json").read_text())
    loss_path(prefix).write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"out\.loss is there, and .*out\.json does not name it"):
        run(tmp_path, plain, [GOOD])
    assert loss_path(prefix).read_bytes() == b"mine"


def test_where_a_template_is_found(tmp_path: Path) -> None:
    """The file of the user, then the folder's own file, then tokenizer_config.json, there the default of several."""
    bare = tokenizer_folder(tmp_path / "t", ["<e>"], None, eos="<e>")
    with pytest.raises(ValueError, match=r"has no chat template: give one with --chat-template FILE"):
        run(tmp_path, bare, [GOOD])
    config = json.loads((bare / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": PLAIN.replace("': '", "'1'")}]
    (bare / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    for name, letter in ((None, "1"), (bare / "chat_template.jinja", "2"), (tmp_path / "mine.jinja", "3")):
        if name is not None:
            name.write_text(PLAIN.replace("': '", f"'{letter}'"))
        run(tmp_path, bare, [GOOD], ChatOptions(name if letter == "3" else None))
        ((ids, _),) = documents(tmp_path / "out")
        assert load_tokenizer(bare).decode(ids).startswith(f"user{letter}Hello")
    for text, why in (("{% generation %}{% for %}", "is no chat template: "), ("\udcff", "is no chat template: ")):
        (tmp_path / "mine.jinja").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=rf"^[^\n]*mine\.jinja {why}[^\n]+$"):
            run(tmp_path, bare, [GOOD], ChatOptions(tmp_path / "mine.jinja"))


def test_the_command(tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"turns": GOOD["messages"]}])
    (tmp_path / "a.txt").write_text("text")
    words = ["tokenize", str(path), "--tokenizer", str(plain), "--output", str(tmp_path / "out"), "--workers", "1"]
    good = [*words, "--chat", "--text-key", "turns", "--max-length", "99", "--too-long", "drop"]
    assert cli.exit_status(partial(cli.run, good)) == 0
    assert "1 document, 24 tokens, 2 of them learnt" in capsys.readouterr().out
    for wrong, why in (
        (["--max-length", "9", "--too-long", "cut"], "--max-length is for conversations: say --chat as well"),
        (["--chat-template", "x"], "--chat-template is for conversations: say --chat as well"),
        (["--chat", "--max-length", "9"], "--max-length is given without --too-long: say drop or cut"),
        (["--chat", "--too-long", "cut"], "--too-long is given without --max-length: say a number of tokens"),
        (["--chat", "--max-length", "1", "--too-long", "cut"], "--max-length is 1: a document needs at least 2"),
        (["--chat", "--train-tokenizer", "300"], "--train-tokenizer learns from texts, not from conversations"),
        (["--chat", "--chat-template", str(tmp_path / "none")], f"{tmp_path / 'none'}: No such file"),
        (["--chat", str(tmp_path / "a.txt")], "a.txt holds no conversations: --chat reads .jsonl, .json and .ndjson"),
    ):
        arguments = (
            [*words, *wrong] if wrong[-1] != str(tmp_path / "a.txt") else ["tokenize", wrong[1], *words[2:], "--chat"]
        )
        assert cli.exit_status(partial(cli.run, arguments)) == 2, wrong
        assert why in capsys.readouterr().err
