"""What pruning methods share: adjustment of masks, gates, hypernetworks, cuts."""
