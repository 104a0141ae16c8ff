"""What a user types: the commands and the help of methods."""
