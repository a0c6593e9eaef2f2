"""Random changes between and during steps, beside torch.optim: `python -m fuzz --help`."""
