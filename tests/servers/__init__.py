"""Real servers of object stores and of HTTP on loopback, and servers that misbehave as told."""
