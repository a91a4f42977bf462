"""docs/reliability.md names a test for every fault that can be provoked, and every test it names is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "reliability.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", TEXT[TEXT.index("## Faults") :], re.MULTILINE)
NAMES = {name for row in ROWS for name in re.findall(r"`(tests/[\w/]+\.py::\w+)`", row[3])}


def is_there(name: str) -> bool:
    path, _, function = name.partition("::")
    if not (ROOT / path).exists():
        return False
    tree = ast.parse((ROOT / path).read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def test_rows_are_numbered_and_every_one_has_a_test_or_a_reason() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 93))
    assert all(test.strip() for *_, test in ROWS)
    assert sum("`tests/" in test for *_, test in ROWS) >= 80


def test_every_test_that_is_named_exists() -> None:
    assert sorted(name for name in NAMES if not is_there(name)) == []


def test_every_path_of_the_document_exists() -> None:
    for path in re.findall(r"`((?:tests|benchmarks|docs)/[\w/.]+\.(?:py|md))(?:::\w+)?`", TEXT):
        assert (ROOT / path).exists(), path
