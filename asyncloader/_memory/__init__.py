"""Memory: fresh pages, what this process may use, what is kept for the next version."""
