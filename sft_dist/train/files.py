"""Small files that are whole or absent, and folders whose entries are on disk."""

import json
import os
from pathlib import Path
from typing import Any

from sft_dist.errors import StorageError
from sft_dist.paths import sync
from sft_dist.redaction import find_secrets, redact_tree


def write_json(path: Path, tree: dict[str, Any], *, writer: str = "") -> None:
    """Write a small file whole or not at all, on disk when this returns; secrets are masked. Raises StorageError.

    Where several processes may write the same file at once, each gives another name in `writer`.
    """
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(json.dumps(masked(tree), indent=2, ensure_ascii=False))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def masked(tree: Any) -> Any:
    """What is written of a tree: without the secrets of this process."""
    return redact_tree(tree, find_secrets(os.environ))
