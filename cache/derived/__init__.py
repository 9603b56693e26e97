"""What is made of caches: catalogues, which list them, and caches with other captions or photos."""
