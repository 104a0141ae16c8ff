"""TOML in; one frozen job out, or every error in it listed."""
