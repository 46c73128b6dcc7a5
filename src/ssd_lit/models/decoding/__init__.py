"""A step of generation in kernels of our own, for one text on a GPU."""
