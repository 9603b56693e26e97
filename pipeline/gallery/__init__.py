"""Photos with their captions: a page for a browser, and sheets as PNG."""
