"""Where bytes come from, and go to: `folder.py` writes, all other modules read."""
