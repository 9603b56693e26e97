"""Captions as people keep them: files of any layout, texts beside photos, texts inside photos."""
