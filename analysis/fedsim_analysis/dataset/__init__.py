"""Runs as labelled arrays of xarray: `opening.open` reads what run files have, `lazy` reads an array when it is used."""
