"""Measuring captioning: of the command, of a loaded model, and of the server."""
