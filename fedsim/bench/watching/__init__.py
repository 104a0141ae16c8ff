"""`fedsim bench watching`: what a run loses while `fedsim watch` looks at it."""

from fedsim.bench.watching.beside import main

__all__ = ["main"]
