"""Where a run writes, and when: what is still there, a scratch folder that is copied back, and the thread that writes."""
