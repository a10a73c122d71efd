"""The model card of an exported folder: what a checkpoint tells of itself, and nothing that it does not know.

Names of corpora and models are the last part of their paths: where they lay is nobody's business. The same checkpoint
and options give the same text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_m1.checkpoint.folder import read_state
from megatron_m1.config import Config
from megatron_m1.config.paths import HUGGING_FACE
from megatron_m1.data.corpora.blend import parse_blend
from megatron_m1.plan.parameters import model_counts
from megatron_m1.printing import counted
from megatron_m1.shapes.registry import layer_mixers
from megatron_m1.shapes.residual import residual_alpha
from megatron_m1.shapes.softmax import rotary_dim

CARD = "README.md"
UNKNOWN = "unknown"
"""The hub's word for a licence that nobody has stated."""
OTHER = "other"
"""The hub's word for one that lies in the folder."""
_TAGS = ["minimax", "lightning-attention", "mixture-of-experts", "megatron-core"]


@dataclass(frozen=True)
class CardFacts:
    """What the card says besides what the checkpoint tells."""

    dtype: str
    """Of the weights, as config.json says it."""
    licence: str | None
    """The hub's identifier; None if nobody has stated one."""
    licence_files: Sequence[str]
    """Names of those in the folder."""
    tokenizer: str | None
    """What kind it is and how many ids it has, in words; None without one."""
    remote_code: bool
    """Whether the hub's own code lies in the folder."""
    caveats: Sequence[str]
    """Of readers, one line each."""


def model_card(checkpoint: Path, config: Config, facts: CardFacts) -> str:
    """Return the text of README.md.

    Args:
        checkpoint: its folder, for the state of training that it was saved at.
        config: its configuration.
        facts: of the export.

    Raises:
        ValueError: the checkpoint's state can't be read.
    """
    state = read_state(checkpoint)
    parts = [
        _front_matter(facts),
        _title(config),
        "## Architecture\n\n" + _table(_architecture(config, facts)),
        "## Training\n\n" + "\n".join(_training(config, state)),
        "## Licence\n\n" + _licence(facts),
        "## How to load it\n\n" + _loading(facts),
        "## What readers get wrong\n\n" + "\n".join(f"- {line}." for line in facts.caveats),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: CardFacts) -> str:
    licence = facts.licence or (OTHER if facts.licence_files else UNKNOWN)
    fields: dict[str, Any] = {"license": licence}
    if licence == OTHER and facts.licence_files:
        fields["license_link"] = facts.licence_files[0]
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": _TAGS}
    return "---\n" + yaml.safe_dump(fields, sort_keys=False) + "---"


def _title(config: Config) -> str:
    return (
        f"# {_short(model_counts(config.model).total)} hybrid of lightning and softmax attention\n\n"
        f"A model of the MiniMax-M1 class, exported by megatron-m1. This card was made from the "
        "checkpoint's own records. It states no evaluation, intended use or risk: whoever publishes the model has to."
    )


def _architecture(config: Config, facts: CardFacts) -> dict[str, str]:
    model = config.model
    total, active = model_counts(model), model_counts(model, active=True)
    kinds = Counter(layer_mixers(model))
    return {
        "Parameters": f"{total.total:,}, of which a token passes through {active.total:,}",
        "Layers": f"{model.num_layers}: {' and '.join(f'{count} {kind} attention' for kind, count in kinds.items())}, "
        "each followed by a mixture of experts",
        "Hidden size": f"{model.hidden_size:,}",
        "Heads": f"{model.num_attention_heads} of {model.kv_channels}; {model.num_query_groups} for keys and values in "
        "softmax attention",
        "Experts": f"{model.num_moe_experts} a layer, {model.moe_router_topk} a token, inner size "
        f"{model.moe_ffn_hidden_size:,}",
        "Rotary dimensions": f"{rotary_dim(model)} of a softmax head, base {model.rotary_base:g}",
        "Residual": f"DeepNorm: the normalised input times {residual_alpha(model):g}, plus the block times "
        f"{model.residual_beta:g}",
        "Vocabulary": f"{model.vocab_size:,} rows",
        "Tokenizer": facts.tokenizer or "none in this folder",
        "Weights": f"{facts.dtype}; the router in float32",
    }


def _training(config: Config, state: dict[str, Any]) -> list[str]:
    source, tokens = state.get("source"), state.get("tokens")
    if state.get("weights_only"):
        name = Path(source).name if isinstance(source, str) else "a folder"
        lines = [
            f"No training here: the weights were imported from {_code(name)}. Their own card says what they were "
            "trained on; it is not part of this folder."
        ]
        if type(state.get("resized_from")) is int:
            new = config.model.vocab_size - state["resized_from"]
            lines.append(f"Untrained, since added on importing: the last {counted(new, 'row')} of embedding and head.")
        return lines
    lines = [f"{tokens:,} tokens" if type(tokens) is int else "An unknown number of tokens"]
    lines[0] += f" in {counted(state['step'], 'step')}{_packs(config)}, in {config.train.precision}."
    if config.run.init_from is not None:
        name = Path(config.run.init_from.removeprefix(HUGGING_FACE)).name
        lines.append(f"Training began with the weights of {_code(name)}, whose own card is not part of this folder.")
    else:
        lines.append("Training began with random weights.")
    return [*lines, "", "Data, as the checkpoint's configuration names them:", "", *_data(config.data.train)]


def _packs(config: Config) -> str:
    tokens = f"{config.data.seq_length:,} tokens"
    if config.stages or config.train.global_batch_size_schedule:
        return f", at last with packs of {tokens}"
    return f" of {counted(config.train.global_batch_size, 'pack')} of {tokens}"


def _data(blend: Sequence[str]) -> list[str]:
    try:
        prefixes, shares = parse_blend(blend)
    except (ValueError, OSError):
        # Without weights, shares come from the corpora's sizes, and these may be elsewhere now.
        return [f"- {_code(Path(word).name)}" for word in blend if not _is_number(word)] or ["- none is named"]
    return [f"- {_code(Path(prefix).name)}: {share:.1%}" for prefix, share in zip(prefixes, shares, strict=True)]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _licence(facts: CardFacts) -> str:
    kept = ", ".join(_code(name) for name in facts.licence_files)
    lines = []
    if facts.licence is not None:
        lines.append(f"Stated by who exported it: {_code(facts.licence)}.")
    elif not facts.licence_files:
        lines.append("None was stated when this folder was written, so the field above says `unknown`: fill it in.")
    if kept:
        lines.append(f"Files that came with the model or its tokenizer, kept as they were: {kept}.")
    return " ".join(lines)


def _loading(facts: CardFacts) -> str:
    names = "AutoModelForCausalLM, AutoTokenizer" if facts.tokenizer else "AutoModelForCausalLM"
    code = [f"from transformers import {names}", ""]
    code += ['model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")  # this folder']
    code += ['tokenizer = AutoTokenizer.from_pretrained(".")'] if facts.tokenizer else []
    own = "" if facts.tokenizer else "--tokenizer PATH "
    text = "```python\n" + "\n".join(code) + "\n```\n\n"
    text += (
        "transformers rounds the router to config.json's dtype as it loads it; `dtype=torch.float32` keeps it.\n"
        f"megatron-m1 reads the folder with `megatron-m1 generate . {own}--prompt TEXT`, and trains on from it with\n"
        "`megatron-m1 pretrain --init-from hf:FOLDER`."
    )
    if facts.remote_code:
        text += "\nThe hub's own modeling code lies beside the weights, for `trust_remote_code=True`."
    return text


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _code(text: str) -> str:
    """A name of others in a Markdown line: nothing in it is markup."""
    plain = "".join(" " if not character.isprintable() or character in "`|" else character for character in text)
    return f"`{plain.strip() or '?'}`"


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
