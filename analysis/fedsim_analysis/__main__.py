"""python -m fedsim_analysis compare RUN.h5 …: the table of `compare`."""

import sys

from fedsim_analysis.comparison import compare, tell

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "compare":
        sys.exit("usage: python -m fedsim_analysis compare RUN.h5 …")
    sys.stdout.write(tell(compare(sys.argv[2:])) + "\n")
