"""Arrays -> arrays: the network, and what it runs on."""
