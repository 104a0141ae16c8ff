"""One page about runs, for people: `command.write` makes it, with a folder of its figures."""
