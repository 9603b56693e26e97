"""What may be typed: kinds of files and names that are near, checked before a command begins."""
