"""What Linux's CPU needs to be fast, out of sight of who reads the model; `adopt` puts it in."""
