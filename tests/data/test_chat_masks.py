"""What is learnt of conversations, against texts that were written out by hand, and against transformers' own mask."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_m1.data.chat.options import ChatOptions
from megatron_m1.data.chat.template import MINIMAX_M1_DIGEST
from megatron_m1.data.tokenize import tokenize_corpus
from megatron_m1.data.tokenizers import load_tokenizer, train_sentencepiece
from tests.data.chats import (
    M1_MARKED,
    NEMOTRON,
    NEMOTRON_MARKS,
    documents,
    m1_folder,
    m1_hub_template,
    m2_folder,
    said,
    spelled,
    tokenizer_folder,
    write_rows,
)

CALL_F = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
CALL_G = {"id": "2", "type": "function", "function": {"name": "g", "arguments": {}}}
AGENT = [
    said("system", "Be kind."),
    said("user", "Hello <end_of_sentence> you"),
    said("assistant", "Wait.", reasoning_content="Hm.", tool_calls=[CALL_F, CALL_G]),
    said("tool", "one", tool_call_id="1"),
    said("tool", "two", tool_call_id="2"),
    said("assistant", "Done [e~["),
    said("user", [{"type": "text", "text": "And"}, {"type": "text", "text": " then?"}]),
    said("assistant", ""),
    said("user", "Still?"),
    said("assistant", "No."),
]
"""Reasoning, two calls and their results, contents in parts, marks that are spelled out, an empty answer."""
AGENT_M1 = [
    (
        0,
        "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nBe kind.<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nHello <end_of_sentence> you<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n",
    ),
    (
        1,
        '<think>\nHm.\n</think>\nWait.\n<tool_calls>\n{"name": "f", "arguments": {"x": "é"}}\n'
        '{"name": "g", "arguments": {}}\n</tool_calls><end_of_sentence>',
    ),
    (
        0,
        "\n<beginning_of_sentence>tool name=tools\ntool name: f\ntool result: one\n\ntool name: g\ntool result: two\n\n"
        "<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n",
    ),
    (1, "Done [e~[<end_of_sentence>"),
    (
        0,
        "\n<beginning_of_sentence>user name=user\nAnd then?<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nStill?<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n",
    ),
    (1, "No.<end_of_sentence>"),
    (0, "\n"),
]


def tokenised(folder: Path, tokenizer: Path, rows: list[Any], template: Path | None = None) -> Path:
    tokenize_corpus(
        [write_rows(folder / "chats.jsonl", rows)], folder / "out", tokenizer, chat=ChatOptions(template), workers=1
    )
    return folder / "out"


def test_minimax_m1(tmp_path: Path) -> None:
    """The hub's own folder has no marks, drops calls in silence and takes no content that is a text."""
    tokenizer = m1_folder(tmp_path / "m1")
    out = tokenised(tmp_path, tokenizer, [{"messages": AGENT}])
    assert spelled(out, tokenizer) == [AGENT_M1]
    ((ids, _),) = documents(out)
    # Of the end marks in the text, the user's and no other is no mark.
    spelled_out = sum(text.count("<end_of_sentence>") for _, text in AGENT_M1)
    assert ids.count(load_tokenizer(tokenizer).eod) == spelled_out - 1


def test_minimax_m1_with_tools(tmp_path: Path) -> None:
    """The two lines of the example in the middle are without quotes, as on the hub."""
    tokenizer = m1_folder(tmp_path / "m1")
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    rows = [
        {"messages": [said("user", "x"), said("assistant", "y")], "tools": given}
        for given in (tools, json.dumps(tools))
    ]
    expected = [
        (
            0,
            "<begin_of_document><beginning_of_sentence>system tool_setting=tools\nYou are provided with these tools:\n"
            '<tools>\n{"name": "f", "parameters": {"type": "object"}}\n</tools>\n\nIf you need to call tools, please '
            "respond with <tool_calls></tool_calls> XML tags, and provide tool-name and json-object of arguments, "
            "following the format below:\n<tool_calls>\n{name: <tool-name-1>, arguments: <args-json-object-1>}\n...\n"
            "</tool_calls><end_of_sentence>\n<beginning_of_sentence>user name=user\nx<end_of_sentence>\n"
            "<beginning_of_sentence>ai name=assistant\n",
        ),
        (1, "y<end_of_sentence>"),
        (0, "\n"),
    ]
    assert spelled(tokenised(tmp_path, tokenizer, rows), tokenizer) == [expected, expected]


def test_the_marked_template_of_minimax_m1_renders_what_the_hubs_does() -> None:
    hub, marked = m1_hub_template(), M1_MARKED.read_text(encoding="utf-8")
    assert hashlib.sha256(hub.encode()).hexdigest() == MINIMAX_M1_DIGEST
    assert "generation" not in hub.replace("add_generation_prompt", "")

    def part(text: str, **more: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text, **more}]

    chats: list[list[dict[str, Any]]] = [
        [said("user", part("a\n\n"))],
        [said("user", part("a")), said("assistant", [])],
        [said("system", part("s")), said("user", part("a")), said("assistant", part("b") + part("\nc"))],
        [
            said("user", part("a")),
            said("assistant", part("b\n")),
            said("tool", part("c", name="n")),
            said("assistant", part("")),
        ],
    ]
    given: list[Any] = [None, [{"name": "f"}]]
    for tools in given:
        for prompt in (False, True):
            texts = [
                render_jinja_template(chats, tools=tools, chat_template=source, add_generation_prompt=prompt)[0]
                for source in (hub, marked)
            ]
            assert texts[0] == texts[1]


def test_minimax_m2s_thinking_is_kept_between_the_tool_calls_of_a_turn(tmp_path: Path) -> None:
    """And a conversation of two turns is two documents, for in the second the thinking of the first is gone."""
    tokenizer = m2_folder(tmp_path / "m2")
    messages = [
        said("user", "One"),
        said("assistant", "", reasoning_content="First.", tool_calls=[CALL_F]),
        said("tool", "1", tool_call_id="1"),
        said("assistant", "I add.", reasoning_content="Second.", tool_calls=[CALL_G]),
        said("tool", "2", tool_call_id="2"),
        said("assistant", "Three", reasoning_content="Third."),
        said("user", "Two"),
        said("assistant", "Five", reasoning_content="Fourth."),
    ]
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "g"}}]
    head = (
        ']~!b[]~b]system\nHelp.\n<tool>{"name": "f"}</tool><tool>{"name": "g"}</tool>[e~[\n]~b]user\nOne[e~[\n]~b]ai\n'
    )
    call_f = (
        '<minimax:tool_call>\n<invoke name="f">\n<parameter name="x">é</parameter>\n</invoke>\n</minimax:tool_call>[e~['
    )
    call_g = '<minimax:tool_call>\n<invoke name="g">\n</invoke>\n</minimax:tool_call>[e~['
    result = "\n]~b]tool\n<response>{}</response>[e~[\n]~b]ai\n"
    first = [
        (0, f"{head}<think>\n"),
        (1, f"First.\n</think>\n\n{call_f}"),
        (0, f"{result.format(1)}<think>\n"),
        (1, f"Second.\n</think>\n\nI add.{call_g}"),
        (0, f"{result.format(2)}<think>\n"),
        (1, "Third.\n</think>\n\nThree[e~["),
        (0, "\n"),
    ]
    past = f"{head}{call_f}{result.format(1)}I add.{call_g}{result.format(2)}Three[e~[\n"
    second = [(0, f"{past}]~b]user\nTwo[e~[\n]~b]ai\n<think>\n"), (1, "Fourth.\n</think>\n\nFive[e~["), (0, "\n")]
    rows = [{"messages": messages, "tools": tools}]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    report = tokenize_corpus([path], tmp_path / "out", tokenizer, chat=ChatOptions(), workers=1)
    assert spelled(tmp_path / "out", tokenizer) == [first, second]
    assert "in a document for each turn, for the template changes earlier turns: 1" in str(report)


def test_a_template_without_marks_is_refused_with_the_fix_which_works(tmp_path: Path) -> None:
    """A real one that has no marks, and no words for calls or tools: what it would leave out is counted and said."""
    tokenizer = tokenizer_folder(tmp_path / "nano", NEMOTRON_MARKS, NEMOTRON, eos="<SPECIAL_12>")
    answered = {
        "messages": [said("system", "S"), said("user", "Hello"), said("assistant", "He\n\n"), said("user", "?")]
    }
    with pytest.raises(
        ValueError, match=r"has no \{% generation %\} marks, so nothing tells[^\n]*--chat-template FILE"
    ):
        tokenised(tmp_path, tokenizer, [answered])
    marked = NEMOTRON.replace(
        r"{{ '<SPECIAL_11>Assistant\n' + content.strip() + '\n<SPECIAL_12>\n' }}",
        r"{{ '<SPECIAL_11>Assistant\n' }}{% generation %}{{ content.strip() + '\n<SPECIAL_12>' }}{% endgeneration %}"
        r"{{ '\n' }}",
    ).replace(
        "{{ '<SPECIAL_11>Assistant\n' + content.strip() + '\n<SPECIAL_12>\n' }}",
        "{{ '<SPECIAL_11>Assistant\n' }}{% generation %}{{ content.strip() + '\n<SPECIAL_12>' }}{% endgeneration %}"
        "{{ '\n' }}",
    )
    assert marked != NEMOTRON
    (tmp_path / "marked.jinja").write_text(marked)
    calls = {"messages": [said("user", "x"), said("assistant", "", tool_calls=[CALL_F])]}
    results = {"messages": [said("user", "x"), said("assistant", "y"), said("tool", "z"), said("assistant", "y")]}
    path = write_rows(tmp_path / "chats.jsonl", [answered, calls, results])
    report = tokenize_corpus(
        [path], tmp_path / "out", tokenizer, chat=ChatOptions(tmp_path / "marked.jinja"), workers=1
    )
    assert spelled(tmp_path / "out", tokenizer) == [
        [
            (0, "<SPECIAL_10>System\nS\n<SPECIAL_11>User\nHello\n<SPECIAL_11>Assistant\n"),
            (1, "He\n<SPECIAL_12>"),
            (0, "\n<SPECIAL_11>User\n?\n"),
        ]
    ]
    assert report.skipped == {"left out in part by the chat template": 2}
    assert "the first left out in part by the chat template: the tool_calls of message 2" in str(report)


@pytest.mark.parametrize("kind", ["m1", "m2"])
def test_ids_and_mask_are_transformers_own(tmp_path: Path, kind: str) -> None:
    """Where no message spells a mark and no answer is empty, which it learns as well."""
    tokenizer = m1_folder(tmp_path / "t") if kind == "m1" else m2_folder(tmp_path / "t")
    messages = [
        said("user", [{"type": "text", "text": "Hello naïve 🙂\n"}]),
        said("assistant", [{"type": "text", "text": "\n中文 <think> He\n"}]),
        said("user", [{"type": "text", "text": " x"}]),
        said("assistant", [{"type": "text", "text": "  y  "}]),
    ]
    out = tokenised(tmp_path, tokenizer, [{"messages": messages}])
    theirs: Any = AutoTokenizer.from_pretrained(str(tokenizer))
    if kind == "m1":
        theirs.chat_template = M1_MARKED.read_text(encoding="utf-8")
    expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert documents(out) == [(expected["input_ids"], expected["assistant_masks"])]


def test_a_token_across_the_bounds_of_a_turn(tmp_path: Path) -> None:
    """Two line breaks are one token. White space beside a turn goes with it; what else is beside it is not learnt."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + 'H' }}{% else %}{{ '\n' }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_folder(tmp_path / "t", ["<e>"], None, eos="<e>")
    rows = [{"messages": [said("user", "a"), said("assistant", "\n\nHell\n")]}]
    assert spelled(tokenised(tmp_path, tokenizer, rows, tmp_path / "t.jinja"), tokenizer) == [
        [(0, "aH"), (1, "\n\n\nHell\n\n")]
    ]
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + 'H' }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    rows = [{"messages": [said("user", "a"), said("assistant", "el")]}]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    report = tokenize_corpus([path], tmp_path / "out", tokenizer, chat=ChatOptions(tmp_path / "t.jinja"), workers=1)
    assert spelled(tmp_path / "out", tokenizer) == [[(0, "aHe"), (1, "l")]]
    assert "tokens on both sides of a turn's bounds, which are not learnt: 1" in str(report)


def test_a_sentencepiece_model_takes_a_template_too(tmp_path: Path) -> None:
    """Its end mark is one where the template prints it, and text where a user does."""
    model = tmp_path / "t.model"
    train_sentencepiece([f"user: Hello\nassistant: the fox {i}\n" for i in range(99)], model, vocab_size=300)
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    rows = [{"messages": [said("user", "Hello </s> é🙂"), said("assistant", "é🙂 fox"), said("user", "x")]}]
    out = tokenised(tmp_path, model, rows, tmp_path / "t.jinja")
    # </s> itself is spelled as nothing
    assert spelled(out, model) == [[(0, "user: Hello </s> é🙂\nassistant: "), (1, "é🙂 fox"), (0, "\nuser: x\n")]]
    ((ids, loss),) = documents(out)
    end = load_tokenizer(model).eod
    assert [(number, bit) for number, bit in zip(ids, loss, strict=True) if number == end] == [(end, 1)]
