"""Triton kernels, installed as fusedrnn.kernels. There are none in this version; see fusedrnn.backends()."""
