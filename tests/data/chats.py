"""Chat templates, tokenizer folders that have them, and what a corpus of conversations says when it is read by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.tokenizers.text.libraries.sft_tokenizer import nemotron_nano_v2_custom_template
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from megatron_m1.data.chat import template as template_module
from megatron_m1.data.corpora.loss_mask import open_loss_mask
from megatron_m1.data.corpora.prefix import open_tokens
from megatron_m1.data.tokenizers import load_tokenizer

M1_MARKED = Path(template_module.__file__).parent / "templates" / "minimax_m1.jinja"
M1_MARKS = ("<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>")

NEMOTRON = nemotron_nano_v2_custom_template
"""A real template that megatron-core ships, without generation marks."""
NEMOTRON_MARKS = ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")

M2_MARKS = ("]~!b[", "]~b]", "[e~[")
M2_TEXT_MARKS = ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>")
M2_LIKE = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}{{ content | map(attribute='text') | join }}{%- endif -%}
{%- endmacro -%}
{{- ']~!b[]~b]system\\n' -}}
{%- if messages[0].role == 'system' -%}{{ text(messages[0].content) }}{%- else -%}{{ 'Help.' }}{%- endif -%}
{%- if tools -%}{{- '\\n' -}}{%- endif -%}
{%- for tool in tools or [] -%}<tool>{{ tool.function | tojson }}</tool>{%- endfor -%}
{{- '[e~[\\n' -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- ']~b]user\\n' ~ text(m.content) ~ '[e~[\\n' -}}
{%- elif m.role == 'assistant' -%}
{{- ']~b]ai\\n' -}}
{%- set thinks = m.reasoning_content and loop.index0 > ns.last -%}
{%- if thinks -%}{{- '<think>\\n' -}}{%- endif -%}
{%- generation -%}
{%- if thinks -%}{{- m.reasoning_content ~ '\\n</think>\\n\\n' -}}{%- endif -%}
{{- text(m.content) -}}
{%- if m.tool_calls -%}
{{- '<minimax:tool_call>\\n' -}}
{%- for call in m.tool_calls -%}
{{- '<invoke name="' ~ call.function.name ~ '">\\n' -}}
{%- for key, value in call.function.arguments.items() -%}
{{- '<parameter name="' ~ key ~ '">' ~ (value if value is string else value | tojson) ~ '</parameter>\\n' -}}
{%- endfor -%}
{{- '</invoke>\\n' -}}
{%- endfor -%}
{{- '</minimax:tool_call>' -}}
{%- endif -%}
{{- '[e~[' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- elif m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- ']~b]tool' -}}{%- endif -%}
{{- '\\n<response>' ~ text(m.content) ~ '</response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '[e~[\\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
"""Built as MiniMax-M2's is: thinking before the last question is dropped, and kept between the tool calls behind it; a
prompt ends behind ``<think>``, so what the model writes begins there."""


def m1_hub_template() -> str:
    """The template of the hub, from the marked one: a test compares its hash."""
    marked = M1_MARKED.read_text(encoding="utf-8").removesuffix("\n")
    bare = marked.replace("{% generation -%}", "")
    return bare.replace("<end_of_sentence>' -}}{% endgeneration -%}{{ '\n", "<end_of_sentence>\n")


def tokenizer_folder(
    folder: Path, marks: Sequence[str], template: str | None, *, eos: str, text_marks: Sequence[str] = ()
) -> Path:
    """A byte-level tokenizer in which two line breaks are one token, with special tokens and others that are text."""
    pieces = [*sorted(ByteLevel.alphabet()), "ĊĊ", "He", "ll"]
    fast = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [("Ċ", "Ċ"), ("H", "e"), ("l", "l")]))
    fast.pre_tokenizer = ByteLevel(add_prefix_space=False)
    fast.decoder = ByteLevelDecoder()
    fast.add_special_tokens(list(marks))
    fast.add_tokens(list(text_marks))
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=eos).save_pretrained(str(folder))
    if template is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


def m1_folder(folder: Path) -> Path:
    """As MiniMax-M1's is on the hub."""
    return tokenizer_folder(folder, M1_MARKS, m1_hub_template(), eos="<end_of_sentence>")


def m2_folder(folder: Path) -> Path:
    """As MiniMax-M2's is, with a template that has marks."""
    return tokenizer_folder(folder, M2_MARKS, M2_LIKE, eos="[e~[", text_marks=M2_TEXT_MARKS)


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def said(role: str, content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def documents(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and loss of each document."""
    tokens, lengths = open_tokens(str(prefix))
    loss = open_loss_mask(str(prefix), tokens.size)
    assert loss is not None
    ends = np.cumsum(lengths)[:-1]
    pairs = zip(np.split(tokens, ends), np.split(loss, ends), strict=True)
    return [(ids.tolist(), learnt.tolist()) for ids, learnt in pairs]


def spelled(prefix: Path, tokenizer: Path) -> list[list[tuple[int, str]]]:
    """Each document as texts that are learnt (1) and not (0), in turn."""
    decode = load_tokenizer(tokenizer).decode
    return [
        [
            (bit, decode([number for number, _ in run]))
            for bit, run in itertools.groupby(zip(ids, loss, strict=True), key=lambda pair: pair[1])
        ]
        for ids, loss in documents(prefix)
    ]
