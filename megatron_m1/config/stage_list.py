"""The ``stages`` of a run as files and flags have them: names, tokens, and the settings that each one changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_m1.config.fields import STAGES, field_types, nearest, tree_groups, unknown
from megatron_m1.config.numbers import whole_number
from megatron_m1.config.older import translate
from megatron_m1.config.tree import Config, StageConfig
from megatron_m1.config.values import expanded, typed
from megatron_m1.config.yaml_tree import flatten
from megatron_m1.printing import shown

FLAG = f"{STAGES}."
"""What the path of a stage's flag begins with: ``--stages.NAME.group.field``."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OF_THE_MODEL = "it would make the model another one"
_OF_THE_RUN = "it is the whole run's"
OF_THE_MODEL = (
    *("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "num_query_groups", "mixers", "ffns"),
    *("residual", "residual_alpha", "residual_beta", "moe_ffn_hidden_size", "num_moe_experts"),
    *("moe_router_score_function", "moe_router_enable_expert_bias", "vocab_size", "rotary_percent"),
    *("layernorm_epsilon", "lightning_norm_epsilon"),
)
"""Fields of ``model`` with which weights are of another model."""
OF_A_STAGE_IN_RUN = ("save_interval", "save_interval_minutes", "keep_checkpoints", "async_save", "max_failed_saves")
"""Fields of ``run`` that a stage may change; the others are the whole run's."""
FORBIDDEN = {
    "preset": _OF_THE_MODEL,
    **{f"model.{name}": _OF_THE_MODEL for name in OF_THE_MODEL},
    **dict.fromkeys(("data.tokenizer", "data.embedded_corpus", "train.seed", "train.max_steps"), _OF_THE_RUN),
}


def why_forbidden(path: str) -> str | None:
    """Say why no stage may change the field at ``path``; None if one may."""
    group, _, name = path.partition(".")
    if group == "run" and name not in OF_A_STAGE_IN_RUN:
        return _OF_THE_RUN
    return FORBIDDEN.get(path)


def read_stages(content: Any) -> list[StageConfig]:
    """Read what a YAML file has below ``stages``; values are as they stand there.

    Raises:
        ValueError: it is no list of stages; one line that names the stage, the key and the fix.
    """
    if content is None:
        return []
    if not isinstance(content, list):
        raise ValueError(f"{STAGES} must be a list of stages, each with name, tokens and groups, not {shown(content)}")
    stages = [_read_stage(entry, number) for number, entry in enumerate(content, start=1)]
    names = [stage.name for stage in stages]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise ValueError(f"{STAGES} has two stages called {twice}: give each a name of its own")
    return stages


def _read_stage(entry: Any, number: int) -> StageConfig:
    if not isinstance(entry, Mapping):
        raise ValueError(f"stage {number} must have name, tokens and groups, not {shown(entry)}")
    name = entry.get("name")
    # YAML takes a name of digits for a number.
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"stage {number} has the name {shown(name)}: give it one of letters, digits, hyphens, dots and underscores"
        )
    own = {key: value for key, value in entry.items() if key not in ("name", "tokens")}
    known = ["name", "tokens", *tree_groups()]
    strange = next((key for key in own if key not in tree_groups()), None)
    if strange is not None:
        reason = why_forbidden(str(strange))
        if reason is not None:
            raise ValueError(f"stage {name} names {strange}: {reason}, give it at the top level")
        raise ValueError(f"stage {name}: {unknown('key', str(strange), known)}")
    with_stage = f"stage {name}: "
    try:
        settings = translate(flatten(own, ""))
    except ValueError as error:
        raise ValueError(f"{with_stage}{error}") from error
    return StageConfig(name, entry.get("tokens"), settings)  # type: ignore[arg-type]


def with_flags(stages: Sequence[StageConfig], flags: Mapping[str, Any]) -> list[StageConfig]:
    """Lay the flags of stages over them, and refuse plain flags of a field that a stage names.

    Args:
        stages: of the files.
        flags: all flags by path, ``stages.NAME.group.field`` among them.

    Raises:
        ValueError: a flag of a stage that is not there, or one that could mean the run or a stage; one line.
    """
    found = {stage.name: StageConfig(stage.name, stage.tokens, dict(stage.settings)) for stage in stages}
    for path, value in flags.items():
        if path.startswith(FLAG):
            name, field = stage_field(path)
            if name not in found:
                there = f"the stages are {', '.join(found)}" if found else "the run has no stages"
                near = nearest(name, list(found))
                raise ValueError(
                    f"--{path}: there is no stage {name}: "
                    + (f"did you mean --{FLAG}{near}.{field}?" if near else there)
                )
            if field == "tokens":
                found[name].tokens = value
            else:
                found[name].settings[field] = value
            continue
        names = [stage.name for stage in stages if path in stage.settings]
        if names:
            which = f"stage {names[0]} names" if len(names) == 1 else f"stages {', '.join(names)} name"
            raise ValueError(f"--{path}: {which} {path}, too: give --{FLAG}{names[0]}.{path} for that stage")
    return list(found.values())


def stage_field(path: str) -> tuple[str, str]:
    """Split the path of a stage's flag into the stage's name, which may have dots, and ``group.field`` or ``tokens``.

    Raises:
        ValueError: no field of a stage; one line with the nearest one.
    """
    rest = path.removeprefix(FLAG)
    name, _, field = rest.rpartition(".")
    if field == "tokens" and name:
        return name, field
    outer, _, group = name.rpartition(".")
    if outer and f"{group}.{field}" in field_types():
        return outer, f"{group}.{field}"
    near = nearest(f"{group}.{field}", list(field_types())) if outer else None
    stage = outer or name or rest
    raise ValueError(f"unknown option --{path}: " + (f"did you mean --{FLAG}{stage}.{near}?" if near else _FORM))


_FORM = f"--{FLAG}NAME.group.field or --{FLAG}NAME.tokens change a stage"


def typed_stages(stages: Sequence[StageConfig], base: Config, *, expand_paths: bool) -> list[StageConfig]:
    """Bring every value of every stage to its type.

    Args:
        stages: as read.
        base: the run's own tree.
        expand_paths: as of ``parse_config``.

    Raises:
        ValueError: a value of the wrong type, a stage without tokens, or a field that no stage may change; one line.
    """
    return [_typed_stage(stage, base, expand_paths=expand_paths) for stage in stages]


def _typed_stage(stage: StageConfig, base: Config, *, expand_paths: bool) -> StageConfig:
    tokens = whole_number(f"stage {stage.name}: tokens", stage.tokens, counts=True)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens <= 0:
        raise ValueError(
            f"stage {stage.name}: tokens = {shown(stage.tokens)}: give the tokens that it trains on, above 0"
        )
    for path in stage.settings:
        reason = why_forbidden(path)
        if reason is not None:
            raise ValueError(f"stage {stage.name} names {path}: {reason}, give it at the top level")
    try:
        tree = typed(stage.settings, base)
        tree = expanded(tree, stage.settings) if expand_paths else tree
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from error
    return StageConfig(stage.name, tokens, {path: value_at(tree, path) for path in stage.settings})


def value_at(config: Config, path: str) -> Any:
    """Return the value of the field at a dotted path."""
    group, _, name = path.partition(".")
    return getattr(getattr(config, group), name)


def stage_entry(stage: StageConfig) -> dict[str, Any]:
    """Return a stage as the YAML that ``read_stages`` reads has it."""
    entry: dict[str, Any] = {"name": stage.name, "tokens": stage.tokens}
    for path, value in stage.settings.items():
        group, _, name = path.partition(".")
        entry.setdefault(group, {})[name] = value
    return entry
