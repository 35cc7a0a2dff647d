"""Triton kernels and their launchers.  Importing this package needs triton; running it needs a CUDA device or
``TRITON_INTERPRET=1`` set before the import.
"""
