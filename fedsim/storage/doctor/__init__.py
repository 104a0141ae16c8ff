"""`fedsim doctor`: what is wrong with a run file, its checkpoints and what stands beside them, and the mending of it.

`complaints.py` reads a file as every reader does and lists what is refused. `opening.py` opens what HDF5 does not open, `salvage.py` takes
out of a file what is sound, and `rebuilding.py` writes that into a new file, which takes the place of the old one only if less is refused
of it. `checkpoints.py` does the same for the folder of checkpoints. `command.py` puts it together.
"""
