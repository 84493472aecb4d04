"""Checkpoints as they are found in the wild -> config and canonical weights."""
