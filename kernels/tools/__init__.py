"""What scripts and tests ask of the compiler: compiled kernels without a GPU, and what they are predicted to cost."""
