"""python -m fedsim_analysis compare RUN.h5… | FOLDER…: the table of `compare`, where fedsim itself is not installed."""

import io
import sys

from fedsim_analysis.comparison import compare, tell
from fedsim_analysis.dataset.sources import files


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] != "compare":
        sys.exit(_refused("usage: python -m fedsim_analysis compare RUN.h5… (or folders; fedsim itself has more commands and options)"))
    try:
        table = compare(files(sys.argv[2:]))
    except (OSError, ValueError) as error:
        sys.exit(_refused(str(error)))
    sys.stdout.write(tell(table) + "\n")


def _refused(message: str) -> int:
    sys.stderr.write(message + "\n")
    return 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale may lack signs
    main()
