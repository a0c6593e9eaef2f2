"""The devices that kernels are made for, one module each."""
