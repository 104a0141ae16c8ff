"""Images in the forms in which data sets are published become one HDF5 file, the form of `data.name = "file"`."""
