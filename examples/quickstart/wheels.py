"""Fetch one wheel from the package registry that pip is set up for, without installing or importing it."""

import subprocess
import sys
from pathlib import Path


def fetch_wheel(name: str, version: str, folder: Path) -> Path:
    """Path of the wheel of name==version in `folder`; downloaded when it is not there yet."""
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "-q", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), f"{name}=={version}"]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(f"{name}=={version} could not be downloaded with pip (see above); is there a network?")
    return next(folder.glob(pattern))
