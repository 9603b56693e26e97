"""Loss and gradients on a GPU: compiled kernels, their check, and CUDA graphs."""
