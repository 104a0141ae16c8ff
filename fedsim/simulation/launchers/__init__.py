"""What a process of a run knows and does before anything heavy is imported: its launcher, its rank, and signals that come early."""
