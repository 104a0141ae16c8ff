"""A comparison for people: tables as sheets, and these as text in several forms."""
