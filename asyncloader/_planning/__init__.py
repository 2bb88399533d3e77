"""Decides what to read, before anything is read. No I/O, no `await`, no torch."""
