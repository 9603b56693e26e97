"""`cap serve`: a model that browsers and other programs ask over HTTP."""
