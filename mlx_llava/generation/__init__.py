"""Inputs -> text."""
