"""Which way of computing is fastest on this machine, measured once and kept in the run file."""
