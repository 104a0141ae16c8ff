"""What an exported network is worth: it is evaluated, and compared with its run."""
