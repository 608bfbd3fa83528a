"""Plans as programs: kernels, the compiler, the program of a site, and two autograd functions."""
