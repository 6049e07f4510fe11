"""Triton kernels, one file per op. They know torch and triton and nothing above them."""
