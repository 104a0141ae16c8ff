"""Runs as plain files for other tools: `command.write` makes CSV, Parquet or netCDF of one run file."""
