"""Programs for people: the demo and, later, the command line."""
