"""What federated pruning is judged against: published methods, a file each, and simple ones."""
