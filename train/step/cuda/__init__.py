"""Loss and gradients on a GPU, with compiled kernels and CUDA graphs."""
