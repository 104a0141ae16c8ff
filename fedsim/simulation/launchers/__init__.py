"""What launchers of MPI ranks tell a process, before MPI has started."""
