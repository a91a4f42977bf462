"""The command line: overrides lie anywhere on it, and what nobody knows is a usage error."""

import pytest

from sft_dist import cli


@pytest.mark.parametrize(
    "line",
    [
        "score run.yaml seed=1 data.max_length=9 --data x --output o",
        "score run.yaml --output o --data x --tokens seed=1 data.max_length=9",
        "score run.yaml seed=1 --data x --output o data.max_length=9",
        "score --data x --output o run.yaml seed=1 data.max_length=9",
    ],
)
def test_overrides_may_come_anywhere(line: str) -> None:
    options = cli._parse(line.split())
    assert options.run_file == "run.yaml" and options.output == "o" and options.data == ["x"]
    assert options.overrides == ["seed=1", "data.max_length=9"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("score run.yaml --output o x.jsonl", "x.jsonl"),
        ("score run.yaml --output o --outptu=p seed=1", "--outptu=p"),
        ("score run.yaml --output o --colour seed=1", "--colour"),
        ("export run --output o seed=1", "seed=1"),
        ("train run.yaml seed=1 --fast", "--fast"),
    ],
)
def test_what_is_no_override_is_a_usage_error(line: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli._parse(line.split())
    assert left.value.code == 2
    assert f"unrecognized arguments: {named}\n" in capsys.readouterr().err
