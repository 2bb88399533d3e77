"""The names of the files of a checkpoint of RecIS's, besides its shards."""

from __future__ import annotations

INDEX = "index"
"""Which shard holds which block. Written last."""

TENSORKEY = "tensorkey.json"
"""The block names of tables."""

DESCRIPTION = "torch_rank_weights_embs_table_multi_shard.json"
"""A description for people and other tools. No load reads it."""

SIDECAR = "asyncloader.json"
"""Digests: ours."""
