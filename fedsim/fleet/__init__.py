"""Who carries out the work of clients: one after the other, stacked, as a CUDA graph, on MPI ranks; the same answer."""
