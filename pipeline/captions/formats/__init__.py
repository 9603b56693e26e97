"""One module for each way in which captions are kept; each returns a `Reading`."""
