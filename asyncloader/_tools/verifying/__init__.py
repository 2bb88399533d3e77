"""What `asyncloader verify` does: looks at everything, and lists all that is wrong."""
