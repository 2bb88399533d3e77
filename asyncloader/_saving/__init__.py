"""Carries saves out: gathers rows, writes shards, makes a checkpoint of the shards of all ranks."""
