"""Names of files that come from a manifest lead to files inside its folder, or are refused; names that are on disk."""

import os
from pathlib import Path, PurePosixPath


def fault_of_name(folder: Path, name: object) -> str | None:
    """Why `name` is not that of a file inside `folder`, or None. Looks at the file system for symbolic links alone."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return f"{name!r} is not the name of a file"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name:
        return f"{name!r} leads out of the folder"
    inside = [folder.joinpath(*path.parts[: number + 1]) for number in range(len(path.parts))]
    link = next((part for part in inside if part.is_symlink()), None)
    return None if link is None else f"{link} is a symbolic link"


def sync(path: Path) -> None:
    """Have a file or folder on disk: after a loss of power a name must not stand for less than what it was given to."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
