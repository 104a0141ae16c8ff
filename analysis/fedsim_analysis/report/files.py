"""Files that are there in full or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def put(path: Path, content: bytes) -> None:
    """Writes the file beside its place and renames it into it. OSError that names the file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            aside.unlink(missing_ok=True)
            with aside.open("xb") as file:  # "x": a link that somebody laid there is not followed
                file.write(content)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
