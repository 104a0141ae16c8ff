"""What clients are charged: prices of a run of a work, and what their reports cost on the air."""
