"""What `fedsim data` says of images: counts, moments, and a sheet of examples."""
