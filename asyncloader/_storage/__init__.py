"""Bytes from somewhere. `storage.folder` writes them; who only reads does not import it."""
