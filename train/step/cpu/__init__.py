"""Loss and gradients on a CPU, and the matrix products they are made of."""
