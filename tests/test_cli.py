"""The command line: overrides lie anywhere on it, and what nobody knows is a usage error."""

import os
import signal
from typing import Any, NoReturn

import pytest
import transformers

from sft_dist import cli, signals
from sft_dist.config import ModelConfig
from sft_dist.errors import ConfigError, ExitCode, Interrupted, exit_code_of
from sft_dist.model import loading
from tests.helpers.signals import restored_signals


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


def test_a_signal_is_not_taken_for_a_fault_of_what_it_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killing runs at random found it: a signal during the reading of weights was called a mistake in model.path."""

    def slow(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", slow)
    with restored_signals(), pytest.raises(Interrupted, match="SIGUSR1") as caught:
        signals.unwind_on_signals()
        loading.load_config(ModelConfig(path="x"), 10)
    assert caught.value.exit_code == 128 + signal.SIGUSR1


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_only_the_first_signal_unwinds(first: signal.Signals) -> None:
    told = []
    with restored_signals():
        signals.unwind_on_signals()
        try:
            signal.raise_signal(first)
        except (Interrupted, KeyboardInterrupt) as error:
            for second in signals.STOPPING:
                signal.raise_signal(second)
            told.append(exit_code_of(error))
    assert told == [128 + first]


def test_what_a_shell_had_ignored_stays_ignored() -> None:
    with restored_signals():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signals.unwind_on_signals()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_ctrl_c_leaves_when_the_verb_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the exception is swallowed, or the clean-up hangs; a burst of signals is one."""
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    with restored_signals():
        signals.unwind_on_signals()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert left == []
        monkeypatch.setattr(signals, "PATIENCE_S", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert left == []
        signal.raise_signal(signal.SIGINT)
        assert left == [130]


@pytest.mark.parametrize("fails", [False, True])
def test_a_signal_as_a_verb_ends_is_told_and_leaves_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    """Until signals are passed over they unwind: that must not go past where errors are told."""

    def pass_over_late() -> None:
        monkeypatch.setattr(cli, "ignore_signals", signals.ignore_signals)
        signal.raise_signal(signal.SIGTERM)

    def dispatch(_: Any) -> ExitCode:
        if fails:
            raise ConfigError("seed: a fault")
        return ExitCode.OK

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(cli, "ignore_signals", pass_over_late)
    monkeypatch.setattr(cli, "_dispatch", dispatch)
    monkeypatch.setattr(cli, "_leave", leave)
    with restored_signals(), pytest.raises(SystemExit) as left:
        cli.main(["config", "run.yaml"])
    assert left.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().err
