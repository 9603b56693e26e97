"""One fast optimizer step: loss, gradients, update. `train.fit` runs many of them."""
