"""Memory: fresh pages, the limits of this process, memory kept for the next version."""
