"""What proves kernels rather than times them: on a GPU, and in compilers' output without one."""
