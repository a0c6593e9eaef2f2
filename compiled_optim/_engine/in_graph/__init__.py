"""Steps inside a user's ``torch.compile``d function."""
