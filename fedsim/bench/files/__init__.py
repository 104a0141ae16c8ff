"""What run files cost: to write, to read, to watch."""
