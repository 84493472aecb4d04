"""Captions of folders: what is asked, where captions are kept, and names made of them."""
