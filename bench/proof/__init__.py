"""What proves kernels rather than times them, on a GPU and without one."""
