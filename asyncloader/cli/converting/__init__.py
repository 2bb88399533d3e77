"""What `asyncloader convert` does: RecIS's format to and from plain safetensors, other ranks."""

from ._convert import Conversion, ConvertedTable, Options, aconvert

__all__ = ["Conversion", "ConvertedTable", "Options", "aconvert"]
