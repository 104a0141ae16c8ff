"""What carries out the runs of a sweep."""
