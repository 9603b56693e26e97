"""Several processes train one model: their connection, and their shares of a batch."""
