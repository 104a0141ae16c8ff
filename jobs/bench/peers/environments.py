"""A virtual environment for each peer, made by pip when it is missing or its requirements have changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
TORCH = torch.__version__.partition("+")[0]


def python_of(peer: str, folder: Path) -> Path:
    """The Python of `folder`/`peer`, which has what requirements-`peer`.txt asks for, and fedsim's own version of torch."""
    made, wanted = folder / peer / "made.txt", HERE / f"requirements-{peer}.txt"
    python = folder.absolute() / peer / "bin" / "python"
    asked = f"{wanted.read_text()}torch=={TORCH}\n"
    if not made.exists() or made.read_text() != asked:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / peer], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", wanted, f"torch=={TORCH}"], check=True)
        made.write_text(asked)
    return python
