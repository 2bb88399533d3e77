"""Which versions of a model are in memory, and which one serves."""
