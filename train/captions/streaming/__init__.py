"""Training on the features of more photos than fit into memory."""
