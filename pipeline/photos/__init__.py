"""What people bring: captions files, and photo files from bytes to pixels."""
