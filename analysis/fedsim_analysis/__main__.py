"""python -m fedsim_analysis compare RUN.h5 …: the table of `compare`."""

import io
import sys

from fedsim_analysis.comparison import compare, tell


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] != "compare":
        sys.exit("usage: python -m fedsim_analysis compare RUN.h5 …")
    try:
        table = compare(sys.argv[2:])
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    sys.stdout.write(tell(table) + "\n")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale may lack signs
    main()
