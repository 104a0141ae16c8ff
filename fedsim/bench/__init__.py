"""Measurements: speed and memory as ratios against a reference in the same run. Each module is one name of `fedsim bench`."""
