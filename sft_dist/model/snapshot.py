"""This rank's part of a checkpoint: what goes into which file, copied to host memory, written file by file."""

import copy
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

Place = tuple[Any, ...]  # the keys and indices that lead to a tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of one rank. Their tensors are those that training changes, or copies of them (`HostMemory.copy`)."""

    files: dict[str, Any]  # path below the checkpoint's folder -> what torch.save writes there
    copied: torch.cuda.Event | None = None  # reached by the device when the copies are complete

    @property
    def num_bytes(self) -> int:
        return sum({id(tensor): tensor.nbytes for _, tensor in _tensors(self.files, ())}.values())

    def wait(self) -> None:
        """Return when the copies are complete; from any thread."""
        if self.copied is not None:
            self.copied.synchronize()


class HostMemory:
    """Room for one snapshot, kept from one to the next: allocating (and pinning) it costs more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[Place, Tensor] = {}

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot that training does not change. The one before must not be in use any more.

        Copies from a GPU are put into its stream, and the call returns before they are made: what the stream does
        later comes after them.
        """
        # What deepcopy finds here it takes as copied: tensors by us, all else (numbers, names, shapes) by deepcopy.
        done: dict[int, Any] = {}
        on_gpu = False
        for place, tensor in _tensors(snapshot.files, ()):
            if id(tensor) not in done:
                done[id(tensor)] = self._buffer(place, tensor).copy_(tensor, non_blocking=True)
                on_gpu = on_gpu or tensor.is_cuda
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        return Snapshot(copy.deepcopy(snapshot.files, done), event)

    def _buffer(self, place: Place, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[place] = buffer
        return buffer


def write_file(path: Path, content: Any) -> dict[str, Any]:
    """torch.save to a new file, which is on disk when this returns: {"num_bytes": ..., "sha256": hexadecimal}.

    The digest is of the bytes that were handed over, not of what a damaged disk gave back. Raises OSError.
    """
    with open(path, "wb") as file:
        sink = _Sink(file)
        torch.save(content, cast(IO[bytes], sink))
        if sink.problem is not None:
            raise sink.problem
        file.flush()
        os.fsync(file.fileno())
    return {"num_bytes": sink.num_bytes, "sha256": sink.digest.hexdigest()}


class _Sink:
    """A file for torch.save that digests what passes, and keeps an error: none may pass through torch's writer."""

    def __init__(self, file: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.problem: OSError | None = None
        self._file = file

    def write(self, data: Any) -> int:
        if self.problem is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.problem = error
            self.digest.update(data)
            self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """torch.save asks for it; `write_file` flushes."""


def _tensors(tree: Any, place: Place) -> Iterator[tuple[Place, Tensor]]:
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors(value, (*place, key))
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from _tensors(value, (*place, number))
