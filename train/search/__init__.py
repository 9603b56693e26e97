"""From a decoder to captions: greedy search, beam search and sampling."""
