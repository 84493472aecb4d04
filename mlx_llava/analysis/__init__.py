"""What a model did, and how well and fast."""
