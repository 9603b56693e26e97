"""`cap bench`: measures how fast each part is on this machine."""
