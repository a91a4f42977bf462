"""The text of a run file: YAML and `section.key=value` overrides, read to a tree.

What the keys mean is the business of config.py.
"""

from pathlib import Path
from typing import Any

import yaml

from sft_dist.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key written twice, of which one would vanish, and a value that is none of its kind.

    Keys are looked at before `<<` puts in those of other mappings, which the ones written here replace.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        written = [key for key, _ in node.value]
        keys = [_MERGE if key.tag == _MERGE else self.construct_object(key, deep=True) for key in written]
        for key, place in zip(keys, written, strict=True):
            if keys.count(key) > 1:
                name = "<<" if key == _MERGE else key
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is there twice", place.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # 2024-02-30, `!!bool x`, `!!timestamp x`
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r} is no {kind}: {error}", node.start_mark
            ) from None


def read_yaml(run_file: Path) -> dict[str, Any]:
    try:
        text = run_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{run_file}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{run_file}: cannot be read: {error}") from None
    tree = _parse(text, f"{run_file}: not valid YAML")
    if tree is None:
        raise ConfigError(f"{run_file}: is empty; expected sections such as `model:` and `data:`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{run_file}: expected sections such as `model:` and `data:`, found {type(tree).__name__}")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[leaf] = _parse(text, f"override {override!r}: not a YAML value")
    # YAML 1.1 reads 1e-5 (no dot) as text; people mean the number.
    if isinstance(node[leaf], str):
        try:
            node[leaf] = float(node[leaf])
        except ValueError:
            pass


def _parse(text: str, what: str) -> Any:
    """The value of YAML, in which nothing is shared. Raises ConfigError that begins with `what`."""
    try:
        return _unshared(yaml.load(text, Loader=_UniqueKeys), ())
    except yaml.YAMLError as error:
        raise ConfigError(f"{what}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{what}: nested too deeply") from None


def _unshared(value: Any, around: tuple[int, ...]) -> Any:
    """A copy in which every alias has its own value: an override of one section must leave the other as it is.

    `around` are the ids of the values that this one lies in.
    """
    if not isinstance(value, (dict, list)):
        return value
    if id(value) in around:
        raise yaml.YAMLError("an alias stands inside the value that it names")
    around = (*around, id(value))
    if isinstance(value, list):
        return [_unshared(item, around) for item in value]
    return {key: _unshared(item, around) for key, item in value.items()}
