"""Chat templates: where one is found, what it wants of messages, and what it makes of a conversation.

Rendering is transformers' own, in its sandbox. What a template reads is found in its syntax tree, and what it takes by
trying; both because a template leaves out what it does not know, and says nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_m1.data.chat.conversation import Conversation
from megatron_m1.data.tokenize.documents import BadDocumentError, SkipReason
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.data.tokenizers.hf_folder import CONFIG, first_line, json_object, read_folder
from megatron_m1.files import regular

TEMPLATE_FILE = "chat_template.jinja"
"""Of a tokenizer folder; it counts before what ``tokenizer_config.json`` has."""
MINIMAX_M1_DIGEST = "11fc33a57630c6e71a2231641db07c724208f4cc7611659c419c027c3fb3cf18"
"""SHA-256 of the template in MiniMax-M1's folder on the hub, which has no marks: ours, which has, renders the same."""
_MARKED = {MINIMAX_M1_DIGEST: "minimax_m1.jinja"}
"""Templates without marks, by SHA-256, and the file beside this one that has them."""
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_PROBE = "vzqk"
"""A word that no template has of its own."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]
    """First character of what the assistant writes, and the one after its last: one pair for each mark of it."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template with generation marks. Make one with ``load_template``."""

    source: str
    name: str
    """What it is called in messages."""
    variables: Mapping[str, str]
    """Named marks of the tokenizer that it may print, such as ``eos_token``."""
    notes: tuple[str, ...] = ()
    """What had to be assumed, one line each."""

    @property
    def digest(self) -> str:
        """SHA-256 of its text, in hexadecimal."""
        return _digest(self.source)

    def render(self, conversation: Conversation) -> Rendered:
        """Make text of a conversation that is as the template wants it.

        Raises:
            BadDocumentError: the template refuses it.
        """
        # What it is annotated to return is not what it returns.
        render: Any = render_jinja_template
        try:
            texts, spans = render(
                [conversation.messages],
                tools=conversation.tools,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self.variables,
            )
        except Exception as error:  # whatever its expressions meet in the messages
            raise BadDocumentError(SkipReason.REFUSED, detail=first_line(error)) from error
        return Rendered(texts[0], sorted((start, end) for start, end in spans[0] if end > start))

    @cached_property
    def reads(self) -> frozenset[str]:
        """Names of variables and fields that it could look at."""
        tree = _parsed(self.source, self.name)
        names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
        fields = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
        words = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        return frozenset(names | fields | words)

    @cached_property
    def takes_text(self) -> bool:
        """Whether it prints a content that is a text."""
        return self._prints(_PROBE)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it prints a content that is a list of parts."""
        return self._prints([{"type": "text", "text": _PROBE}])

    @property
    def has_calls_in_content(self) -> bool:
        """Whether it tells the model to write ``<tool_calls>`` and leaves that to the content, as MiniMax-M1's does."""
        return "<tool_calls>" in self.source and "tool_calls" not in self.reads

    def _prints(self, content: object) -> bool:
        conversation = Conversation([{"role": "user", "content": content}], None)
        try:
            text = self.render(conversation).text
        except BadDocumentError:
            return False
        # A list that is printed as Python spells it is not taken.
        return _PROBE in text and "'text'" not in text


def load_template(tokenizer: Tokenizer, tokenizer_path: Path, file: Path | None) -> ChatTemplate:
    """Find the template with which conversations are rendered.

    Args:
        tokenizer: that encodes what is rendered.
        tokenizer_path: its folder or ``.model`` file.
        file: a template that counts instead of the folder's.

    Raises:
        OSError: a file can't be read.
        ValueError: there is none, it is no template, or it has no generation marks; one line with the fix.
    """
    found = None if file is None else (str(file), _read(file))
    variables = _variables(tokenizer, tokenizer_path)
    found = found or _of_folder(tokenizer_path)
    if found is None:
        raise ValueError(
            f"tokenizer {tokenizer_path} has no chat template: give one with --chat-template FILE (docs/fine_tuning.md)"
        )
    name, source = found
    marked, notes = _MARKED.get(_digest(source)), []
    if marked is not None:
        source = _read(Path(__file__).parent / "templates" / marked)
        notes.append(f"{name} has no generation marks: {marked} of this package, which has them, renders the same text")
    if not _GENERATION.search(source):
        raise ValueError(
            f"{name} has no {{% generation %}} marks, so nothing tells what the assistant writes: give a copy with"
            " {% generation %} before and {% endgeneration %} behind that, end mark included, as --chat-template FILE"
            " (docs/fine_tuning.md)"
        )
    template = ChatTemplate(source, name, variables, tuple(notes))
    if "strftime_now" in template.reads:
        notes.append(f"{name} may print the date: what is tokenised on another day is another text")
    return ChatTemplate(source, name, variables, tuple(notes))


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


def _read(file: Path) -> str:
    try:
        return regular(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no chat template: {error}") from error


def _of_folder(path: Path) -> tuple[str, str] | None:
    """Name and text of a folder's template; None if it has none."""
    if not path.is_dir():
        return None
    if (path / TEMPLATE_FILE).is_file():
        return str(path / TEMPLATE_FILE), _read(path / TEMPLATE_FILE)
    config = path / CONFIG
    given = json_object(config, config.read_bytes() if config.is_file() else None).get("chat_template")
    name = f"the chat template of {config}"
    if isinstance(given, list):
        # Several, of which this is the one for all purposes.
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given, name = named.get("default"), f"{name} called default"
    return (name, given) if isinstance(given, str) and given else None


def _variables(tokenizer: Tokenizer, path: Path) -> dict[str, str]:
    if path.is_dir():
        return read_folder(path).mark_texts()
    return {"eos_token": next((mark for mark in tokenizer.ids.marks if _id_of(tokenizer, mark) == tokenizer.eod), "")}


def _id_of(tokenizer: Tokenizer, mark: str) -> int | None:
    ids = tokenizer.ids.encode_placed(mark, with_marks=True).ids.tolist()
    return ids[0] if len(ids) == 1 else None


def _parsed(source: str, name: str) -> Any:
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        return environment.parse(_GENERATION.sub("", source))
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        raise ValueError(f"{name} is no chat template: {first_line(error)}") from error
