"""YAML of plain values: what it may hold, and one line for what it may not."""

from __future__ import annotations

from typing import Any

import yaml

from megatron_m1.printing import shown


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which by itself lets a key that comes twice overwrite the first in silence.

    Nor does it say where a value stands that is none, such as the date 2001-99-99.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"{shown(node.value)} is no {kind}" if isinstance(node, yaml.ScalarNode) else f"no {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            # One that merges other mappings ("<<") may be of exponential size, and groups share no fields.
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "this is no name of a field", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(key.value)} is there twice: keep one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values, in whose mappings no key comes twice.

    Raises:
        ValueError: it is none, or is nested too deeply; one line.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except RecursionError as error:
        raise ValueError("no valid YAML: nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or "a character that YAML does not allow")
        raise ValueError(f"no valid YAML{place}: {problem}") from error
