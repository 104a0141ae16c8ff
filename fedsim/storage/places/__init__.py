"""Where a run writes: whether that is still there, and a scratch folder that is copied back."""
