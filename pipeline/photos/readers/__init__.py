"""Readers: threads or processes that read, digest and decode photo files for `PhotoLoader`."""
