"""One optimizer step, made fast: loss, gradients, update. What spans steps is in `fit`."""
