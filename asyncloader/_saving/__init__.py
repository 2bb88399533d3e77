"""Carries saves out: gathers rows, writes shards, makes a checkpoint of what ranks have written."""
