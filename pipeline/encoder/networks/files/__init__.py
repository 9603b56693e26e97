"""Files with weights: what is read of them, and how a network finds its tensors in them."""
