"""The published methods, one file each. A file put here is a method by its name."""
