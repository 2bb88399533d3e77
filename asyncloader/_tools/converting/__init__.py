"""What `asyncloader convert` does: RecIS's format to and from plain safetensors, other ranks."""
