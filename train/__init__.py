"""From a cache to a trained decoder: vocabulary, steps, search, scores, runs. No images."""
