"""Says what a file is that is no safetensors file, by its first bytes."""

from __future__ import annotations

import re

LOOKED_AT = 512
"""How many of a file's first bytes tell."""

# What a file begins with, what that is, and what to do. `torch.save` writes ZIP archives, and wrote
# pickles before.
_BEGINNINGS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, in place of the file that it stands for",
        "fetch the file: `git lfs pull`",
    ),
    (
        b"PK\x03\x04",
        "a ZIP archive, such as torch.save writes (.pt, .bin)",
        "load it with torch.load and write it with safetensors.torch.save_file",
    ),
    (b"GGUF", "a GGUF file, of llama.cpp", "take the safetensors file of the same model"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it: `gzip -d`"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it: `zstd -d`"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it: `xz -d`"),
    (b"BZh", "compressed with bzip2", "unpack it: `bzip2 -d`"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "convert it to safetensors"),
    (b"\x93NUMPY", "a NumPy array (.npy)", "convert it to safetensors"),
    (bytes(8), "zeros, as a copy that broke off leaves them", "copy the file again"),
)
_PATTERNS = (
    (
        re.compile(rb"\x80[\x02-\x05][\x8a\x95}(\x5dcq]"),
        (
            "a pickle, such as torch.save wrote; load it with torch.load and write it with "
            "safetensors.torch.save_file"
        ),
    ),
    (
        re.compile(rb"\s*(<!doctype html|<html|<head|<body)", re.IGNORECASE),
        "an HTML page: the download brought a web page; download the file again",
    ),
    (
        re.compile(rb"\s*(<\?xml|<[a-z]+[ >])", re.IGNORECASE),
        "an XML text, such as a store's error message; download the file again",
    ),
    (
        re.compile(rb"\s*[{[]\s*[\"{}\[\]]"),
        "JSON text, not tensors; if it lists a checkpoint's files, give its folder",
    ),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive; unpack it"),
)


def kind_of(start: bytes) -> str | None:
    """Return what a file is and what to do; `None` if its beginning does not tell.

    Args:
        start: Its first bytes, best `LOOKED_AT` of them.
    """
    for beginning, kind, advice in _BEGINNINGS:
        if start.startswith(beginning):
            return f"{kind}; {advice}"
    text = start.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    return next((kind for pattern, kind in _PATTERNS if pattern.match(text)), None)
