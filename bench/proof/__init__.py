"""What proves kernels rather than times them: on a GPU, and by what compilers make of them without one."""
