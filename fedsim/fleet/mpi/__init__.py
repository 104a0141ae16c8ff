"""Clients on MPI ranks: rank 0 sends work orders, the workers answer."""
