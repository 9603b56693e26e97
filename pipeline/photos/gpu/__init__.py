"""JPEGs decoded and resized on a GPU, to the very pixels of `pipeline.photos.preprocessing`."""
