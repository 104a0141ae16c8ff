"""The ways to differentiate one call of a net, and what a gradient can be: whole, of a compact network, tapped."""
