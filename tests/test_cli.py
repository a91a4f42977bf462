"""The command line: overrides lie anywhere on it, and what nobody knows is a usage error."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import transformers

from sft_dist import cli, signals
from sft_dist.config import ModelConfig
from sft_dist.errors import Interrupted, exit_code_of
from sft_dist.model import loading


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


@contextmanager
def own_signals() -> Iterator[None]:
    """Signals as a verb takes them, for a while."""
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    signals.unwind_on_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_is_not_taken_for_a_fault_of_what_it_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killing runs at random found it: a signal during the reading of weights was called a mistake in model.path."""

    def slow(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", slow)
    with own_signals(), pytest.raises(Interrupted, match="SIGUSR1") as caught:
        loading.load_config(ModelConfig(path="x"), 10)
    assert caught.value.exit_code == 128 + signal.SIGUSR1


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_only_the_first_signal_unwinds(first: signal.Signals) -> None:
    told = []
    with own_signals():
        try:
            signal.raise_signal(first)
        except (Interrupted, KeyboardInterrupt) as error:
            for second in signals.STOPPING:
                signal.raise_signal(second)
            told.append(exit_code_of(error))
    assert told == [128 + first]


def test_what_nohup_ignores_stays_ignored() -> None:
    with own_signals():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signals.unwind_on_signals()
        signal.raise_signal(signal.SIGINT)
