"""Triton kernels and their launchers. Imported by the operators when they first run, never by `import star_kernels`."""
