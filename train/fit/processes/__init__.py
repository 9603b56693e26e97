"""A run of several processes: what the first one tells the others, and what they do."""
