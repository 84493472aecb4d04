"""What a user has -> Inputs, in NumPy."""
