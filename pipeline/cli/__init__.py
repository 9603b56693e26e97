"""The command line: parses, calls, prints and translates errors. No logic here."""
