"""Which images there are, and which client holds which."""
