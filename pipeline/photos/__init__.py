"""The user's files: captions files, and photo files from bytes to pixels."""
