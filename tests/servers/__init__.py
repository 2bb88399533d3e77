"""Real servers of object stores, for tests: each in processes of its own, on loopback."""
