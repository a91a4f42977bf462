"""Ranges of the tensors in a model folder's safetensors, read from the files as they are asked for.

Nothing is mapped or kept: what was read belongs to the caller. The files stay open, so that a folder that is replaced
meanwhile still answers with what it held.
"""

import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from sft_dist.errors import StorageError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one


class StoredTensors:
    """Floating-point tensors of a model folder's safetensors, by name: those of the files that transformers loads.

    Raises StorageError for files that cannot be read; a folder without safetensors has no tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[int, int, torch.dtype]] = {}  # name -> file descriptor, first byte, dtype
        self._paths: dict[int, Path] = {}
        for path in _files(folder):
            try:
                self._add(path)
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise StorageError(f"{path}: not a readable safetensors file: {error}") from None

    def read(self, name: str, into: Tensor, *, start: int) -> None:
        """Fill the flat tensor `into`, of any dtype on the CPU, with elements from `start` on. Raises StorageError."""
        file, first, dtype = self._places[name]
        num_bytes = into.numel() * dtype.itemsize
        content = bytearray()
        try:
            while len(content) < num_bytes:
                piece = os.pread(file, num_bytes - len(content), first + start * dtype.itemsize + len(content))
                if not piece:
                    raise StorageError(f"{self._paths[file]}: ends within {name}")
                content += piece
        except OSError as error:
            raise StorageError(f"{self._paths[file]}: {name} cannot be read: {error}") from None
        if content:
            into.copy_(torch.frombuffer(content, dtype=dtype))

    def close(self) -> None:
        for file in self._paths:
            os.close(file)
        self._paths, self._places, self.shapes = {}, {}, {}

    def _add(self, path: Path) -> None:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._paths[file] = path
        header_bytes = int.from_bytes(os.pread(file, 8, 0), "little")
        if header_bytes > _LONGEST_HEADER:
            raise ValueError(f"a header of {header_bytes:,} bytes")
        header = json.loads(os.pread(file, header_bytes, 8))
        for name, tensor in header.items():
            dtype = _DTYPES.get(tensor.get("dtype"))
            if dtype is None:
                continue
            begin, end = tensor["data_offsets"]
            shape = tuple(tensor["shape"])
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {end - begin} bytes for the shape {shape}")
            self.shapes[name] = shape
            self._places[name] = file, 8 + header_bytes + begin, dtype


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        return [folder / WEIGHTS] if (folder / WEIGHTS).exists() else []
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise StorageError(f"{index}: not a readable index of weights: {error}") from None
    return sorted(folder / str(name) for name in names)
