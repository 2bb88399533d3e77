"""Reads the names in plain safetensors files: one file, or a folder of Hugging Face's.

The key in a file's header is the tensor's name, as it stands. Of several files `SHARDED` says which
tensor stands in which: `{"metadata": {...}, "weight_map": {tensor: file}}`.
"""

from __future__ import annotations

import re
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING

from asyncloader.errors import CheckpointError

from .index import Catalog, Places, is_file_name, json_object, members_of_objects

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .header import ShardHeader
    from .problems import Problems


SHARDED = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# The names that libraries give: transformers, diffusers, peft. The first one found counts, and a
# file without a variant comes before a file with one.
_STEMS = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights")
_INDEX = re.compile(r".+\.safetensors\.index(\.[^.]+)?\.json")
# A shard, `model.fp16-00001-of-00002.safetensors`, is no variant.
_VARIANT = r"(\.(?![^.]+-\d+-of-\d+\.)[^.]+)?"
_MODEL = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)}){_VARIANT}\.safetensors(?:\.index{_VARIANT}\.json)?"
)
_NAMED = 8


def is_weight_map(name: str) -> bool:
    """Say whether a file is called like one that says which tensor stands in which file."""
    return _INDEX.fullmatch(name) is not None


def model_in(location: str, names: Iterable[str]) -> str | None:
    """Return the file of a folder that names a model's tensors: a weight map, or the only file.

    Raises:
        CheckpointError: If several variants of a model are equally good.
    """
    found = [match for match in map(_MODEL.fullmatch, sorted(names)) if match is not None]
    for stem in _STEMS:
        variants: dict[str, list[str]] = {}
        for match in found:
            if match["stem"] == stem:
                variants.setdefault((match[2] or "") + (match[3] or ""), []).append(match[0])
        plain = variants.get("")
        equal = variants.values() if plain is None else [plain]
        files = [file for own in equal for file in list(filter(is_weight_map, own)) or own]
        if len(files) > 1:
            problem = f"holds several variants, {', '.join(map(repr, files))}: give one's path"
            raise CheckpointError(location, problem)
        if files:
            return files[0]
    return None


def in_words(names: Sequence[str]) -> str:
    """Name the files of a folder."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, sorted(names)[:_NAMED])) + more if names else "nothing"


def catalog_of_file(header: ShardHeader) -> Catalog:
    """Return the names in one file's header."""
    keys = {key: key for key in header.blocks}
    places, file = Places(keys, dict.fromkeys(keys, header.shard)), header.shard
    return Catalog(places, {}, file, (file,), header=header)


def parse_weight_map(problems: Problems, text: bytes | bytearray, name: str = SHARDED) -> Catalog:
    """Read the text of `SHARDED`, or of another file of its kind.

    Raises:
        CheckpointError: If it is not such JSON.
    """
    value = json_object(problems.location, name, text, members_of_objects)
    weight_map = value.get("weight_map")
    if not isinstance(weight_map, dict):
        problem = f"its weight_map is {shown(weight_map)}, not an object {{tensor: file}}"
        raise CheckpointError(problems.location, problem, name)
    sound = {}
    for key, shard in weight_map.items():
        if isinstance(shard, str) and is_file_name(shard):
            sound[key] = shard
        else:
            problems.add(f"its file {shown(shard)} is not a plain file name", name, key)
    places = Places({key: key for key in sound}, sound)
    return Catalog(places, {}, name, tuple(sorted(set(sound.values()))))
