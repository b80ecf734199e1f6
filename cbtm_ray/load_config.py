"""Strict YAML and `section.key=value` overrides into a `Config`, with errors a person can act on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from cbtm_ray.config import Config
from cbtm_ray.errors import UserError, unknown_key

_MERGE = "tag:yaml.org,2002:merge"


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without the surprise that a repeated key silently replaces the first one."""


def _mapping_without_repeats(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping; keys of its own may replace those that `<<` merges into it, which are checked as mappings of their own."""
    keys = []
    for key, value in node.value:
        if key.tag == _MERGE:
            loader.construct_object(value, deep=True)
        keys.append(key.value if key.tag == _MERGE else loader.construct_object(key))
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(
                f"{key} stands twice, the second time at line {node.start_mark.line + 1} or below. Keep one."
            )
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def load_config(path: str, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply overrides such as `train.total_tokens=100000`, and validate.

    Raises:
        UserError: one line that names the field, its value, what is allowed and the nearest valid key.
    """
    file = Path(os.path.expanduser(path))  # leaves the `~` of a user that there is not
    if not file.is_file():
        raise UserError(f"--config={path} is not a file. Give a YAML file such as configs/quickstart.yaml.")
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config={path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise UserError(f"--config={path}: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"--config={path} must hold sections such as 'run:' and 'corpus:'.")
    for override in overrides or []:
        _apply_override(tree, override)
    return build_config(tree)


def build_config(tree: dict[str, Any]) -> Config:
    """A validated `Config` from nested dictionaries; errors as in `load_config`."""
    try:
        return TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        raise UserError("; ".join(_explain(item) for item in error.errors()[:3])) from error


def config_tree(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, ready for YAML or JSON."""
    return yaml.safe_load(dump_config(config))


def dump_config(config: Config) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise UserError(f"{override!r} is not an override. Write section.key=value, such as train.total_tokens=100000.")
    if not isinstance(tree.setdefault(section, {}), dict):
        raise UserError(f"{section}={tree[section]!r} must be a section with keys.")
    try:
        tree[section][name] = yaml.load(text, _UniqueKeyLoader) if text else None
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML. Quote it.") from error


def _explain(item: Any) -> str:
    """One pydantic error as `field=value must ...`, or `unknown_key`'s line."""
    location = [str(part) for part in item["loc"]]
    name, message, value = ".".join(location), item["msg"], item["input"]
    if item["type"] == "unexpected_keyword_argument":
        return unknown_key(location[-1], _fields(location[:-1]), ".".join(location[:-1]))
    if item["type"] == "string_pattern_mismatch":
        return f"{name}={value!r}: must not be empty. Give it, or leave the field out."
    if item["type"] == "tuple_type":
        return f"{name}={value!r}: must be a list. Write it in brackets: {name}=[...]."
    if item["type"] == "too_long":
        return f"{name}={list(value)!r} has too many values. Give at most {item['ctx']['max_length']}."
    if item["type"] == "missing" and isinstance(item["loc"][-1], int):
        return f"{'.'.join(location[:-1])}={list(value)!r} has too few values. Give at least {item['loc'][-1] + 1}."
    if item["type"] == "missing":
        return f"{name} is missing. Add it to the config file or give {name}=VALUE on the command line."
    if item["type"] == "value_error":
        return f"{message.removeprefix('Value error, ').rstrip('.')}."
    return f"{name}={value!r}: {message.replace('Input should be', 'must be')}."


def _fields(location: list[str]) -> list[str]:
    """Names of the fields of the section at `location`."""
    owner: Any = Config
    for part in location:
        owner = get_type_hints(owner)[part]
    return [field.name for field in dataclasses.fields(owner)]
