"""Finding captions with a decoder: greedy search, beam search and sampling."""
