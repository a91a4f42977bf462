"""The output while it grows, on rank 0: one partial file a model, and a journal by which the same command continues.

    OUTPUT.partial-1, -2, …   lines of each model; what lies beyond the bytes that the journal names does not count
    OUTPUT.journal            what is scored with what; of each model: how many samples, bytes, sums for the summary
    OUTPUT.journal.lock       held by the process that may touch the others
    OUTPUT.partial-merged     the lines of several models side by side, before the rename

A block's lines are on disk before the journal names them, and the output appears by one rename at the end, which the
journal foretells, so that a kill at any instant costs one block at most.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from sft_dist.errors import ClusterError, ConfigError, StorageError
from sft_dist.score.summary import Tally
from sft_dist.train.files import write_json

# What every line says of its conversation, whichever model scores it.
_HEAD = ("id", "index", "source", "left_out")


@dataclass(frozen=True, slots=True)
class Part:
    """How far one model is."""

    num_done: int = 0  # samples, or records of candidates
    num_bytes: int = 0
    is_whole: bool = False
    tally: Tally = field(default_factory=Tally)


class GrowingOutput:
    """The partial files of one output, locked against a second process as long as this one lives."""

    def __init__(self, output: Path, settings: dict[str, Any], num_parts: int) -> None:
        """Continue what a run with the same settings left, or start anew.

        Raises ConfigError where another command left something, ClusterError where a process is writing it now.
        """
        self.output = output
        self._settings = settings
        self._journal = output.with_name(output.name + ".journal")
        self._paths = [output.with_name(f"{output.name}.partial-{number + 1}") for number in range(num_parts)]
        self._whole = self._paths[0] if num_parts == 1 else output.with_name(output.name + ".partial-merged")
        self._files: list[BinaryIO] = []
        with self._storage():
            self._lock = _locked(output.with_name(output.name + ".journal.lock"), output)
            try:
                self.is_published, parts = self._left_behind()
                self.parts = parts or [Part()] * num_parts
                if not self.is_published:
                    self._open_parts()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Let go of the files and of the lock."""
        for file in (*self._files, self._lock):
            file.close()

    def append(self, number: int, lines: Sequence[dict[str, Any]], tally: Tally, *, num_done: int) -> None:
        """Add the lines of one block of one model; they count when this returns."""
        content = b"".join(map(_encoded, lines))
        part, file = self.parts[number], self._files[number]
        with self._storage():
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            self.parts[number] = replace(
                part, num_done=num_done, num_bytes=part.num_bytes + len(content), tally=part.tally + tally
            )
            self._write_journal()

    def finish(self, number: int) -> None:
        """No block of this model is left."""
        self.parts[number] = replace(self.parts[number], is_whole=True)
        with self._storage():
            self._write_journal()

    def publish(self, names: Sequence[str]) -> None:
        """Put the whole output in place: the lines of one model, or those of several side by side under `models`."""
        with self._storage():
            if not self.is_published:
                if len(self._paths) > 1:
                    self._merge(names)
                self._write_journal(published_bytes=self._whole.stat().st_size)
                os.replace(self._whole, self.output)
                self.is_published = True
            for path in (*self._paths, self._journal, Path(self._lock.name)):
                path.unlink(missing_ok=True)

    def _open_parts(self) -> None:
        for path, part in zip(self._paths, self.parts, strict=True):
            file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - open as long as this object lives
            self._files.append(file)
            if os.fstat(file.fileno()).st_size < part.num_bytes:
                raise StorageError(f"{path}: shorter than {self._journal} says; remove both to start anew")
            file.truncate(part.num_bytes)
            file.seek(part.num_bytes)

    def _merge(self, names: Sequence[str]) -> None:
        with open(self._whole, "wb") as file:
            for texts in zip(*(open(path, "rb") for path in self._paths), strict=True):  # noqa: SIM115 - few files
                lines = [json.loads(text) for text in texts]
                head = {key: value for key, value in lines[0].items() if key in _HEAD}
                scores = [{key: value for key, value in line.items() if key not in _HEAD} for line in lines]
                merged = head | {"models": dict(zip(names, scores, strict=True))}
                file.write(_encoded(merged))
            file.flush()
            os.fsync(file.fileno())

    def _left_behind(self) -> tuple[bool, list[Part] | None]:
        """Whether the output is in place already, and how far each model is, if a run has begun."""
        try:
            journal = json.loads(self._journal.read_text())
            before, published_bytes = journal["settings"], journal["published_bytes"]
            parts = list(map(_part, journal["parts"]))
            if not isinstance(before, dict) or type(published_bytes) not in (int, type(None)):
                raise ValueError("settings or published_bytes: not of the right kind")
        except FileNotFoundError:
            return False, None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None
        # Killed after the rename: the parts may be gone, and what the journal says is of use to the same command only.
        is_renamed = published_bytes is not None and not self._whole.exists()
        is_in_place = is_renamed and self.output.is_file() and self.output.stat().st_size == published_bytes
        if is_renamed and not (is_in_place and before == self._settings):
            return False, None
        keys = [key for key in before.keys() | self._settings.keys() if before.get(key) != self._settings.get(key)]
        if keys:
            changed = "\n".join(
                f"  {key}: {before.get(key)!r} there, {self._settings.get(key)!r} now" for key in sorted(keys)
            )
            raise ConfigError(
                f"--output: {self.output}: another command has begun to score into it:\n{changed}\n"
                f"  finish that one, choose another output, or remove {self._journal} to start anew"
            )
        if len(parts) != len(self._paths):
            raise self._damaged(f"it tells of {len(parts)} model(s), {len(self._paths)} are scored")
        return is_in_place, parts

    def _damaged(self, why: str) -> StorageError:
        return StorageError(f"{self._journal}: not readable ({why}); remove it to start anew")

    def _write_journal(self, published_bytes: int | None = None) -> None:
        parts = [asdict(part) for part in self.parts]
        write_json(self._journal, {"settings": self._settings, "parts": parts, "published_bytes": published_bytes})

    @contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"--output: {self.output}: cannot be written: {error.strerror or error}") from error


def check_writable(output: Path) -> None:
    """Raise StorageError before any work where nothing could be written in the end."""
    if output.is_dir():
        raise StorageError(f"--output: {output}: is a folder; name a file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f"{output.name}."):
            pass
    except OSError as error:
        raise StorageError(f"--output: {output}: cannot be written: {error.strerror or error}") from error


def _part(tree: Any) -> Part:
    """A part as the journal has it. Raises ValueError, LookupError, TypeError or AttributeError for anything else."""
    tally = Tally(**tree["tally"])
    part = Part(**tree | {"tally": tally})
    numbers = [part.num_done, part.num_bytes, *tally.counts.values(), *tally.tokens.values()]
    is_right = set(map(type, numbers)) <= {int} and min(numbers) >= 0 and type(part.is_whole) is bool
    if not is_right or set(map(type, tally.nll.values())) - {int, float} or tally.nll.keys() != tally.tokens.keys():
        raise ValueError("a part of it is not of the right kind")
    return part


def _encoded(line: dict[str, Any]) -> bytes:
    """One line of JSON. A lone surrogate, as in the name of a file that is no UTF-8, becomes its JSON escape."""
    return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _locked(path: Path, output: Path) -> BinaryIO:
    """The file, open for writing, held by this process alone; the operating system lets go of it with the process."""
    file = open(path, "ab")  # noqa: SIM115 - held as long as the process lives
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except BlockingIOError:
        is_ours = False
    if not is_ours:
        file.close()
        raise ClusterError(f"--output: {output}: another process is scoring into it")
    return file
