"""`file`: a user's own data in one HDF5 or npz file."""
