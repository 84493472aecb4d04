"""Text over HTTP."""
