"""The data half: what is trained, in which order, as which tensors."""
