"""What the author of a method writes with: Method, Work, Report, aggregation and shared client work."""
