"""Fleets: who carries out Work. Serial is the reference, packed stacks clients, MPI asks ranks that are either; the same answer."""
