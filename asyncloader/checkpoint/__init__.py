"""What a checkpoint is: names, slices, dtypes, shard headers."""

from ._dtypes import BY_TORCH, DTYPES, DType
from ._header import Block, ShardHeader
from ._index import Catalog, Part, Place
from ._manifest import Manifest, read_catalog, read_manifest
from ._slices import DEFAULT_SLICE_SIZE, Slice, gen_slice

__all__ = [
    "BY_TORCH",
    "DEFAULT_SLICE_SIZE",
    "DTYPES",
    "Block",
    "Catalog",
    "DType",
    "Manifest",
    "Part",
    "Place",
    "ShardHeader",
    "Slice",
    "gen_slice",
    "read_catalog",
    "read_manifest",
]
