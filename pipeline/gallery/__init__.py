"""Photos with their captions: a page for a browser, and a contact sheet in one PNG."""
