"""HATA's selection: the PyTorch specification (`reference`) and the Triton kernels held to it."""
