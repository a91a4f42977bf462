"""The text of a run file: YAML and `section.key=value` overrides, read to a tree.

What the keys mean is the business of config.py.
"""

from pathlib import Path
from typing import Any

import yaml

from sft_dist.errors import ConfigError


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key written twice, of which one would vanish.

    Looked for before `<<` puts in the keys of other mappings, which those written here replace.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in written]
        for key, place in zip(keys, written, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", place.start_mark)
        return node


def read_yaml(run_file: Path) -> dict[str, Any]:
    try:
        text = run_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{run_file}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{run_file}: cannot be read: {error}") from None
    try:
        tree = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"{run_file}: not valid YAML: {error}") from None
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
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not a YAML value: {error}") from None
    # YAML 1.1 reads 1e-5 (no dot) as text; people mean the number.
    if isinstance(node[leaf], str):
        try:
            node[leaf] = float(node[leaf])
        except ValueError:
            pass
