"""The hash table: ids → rows, with updates that show all at once. Savers use `table.snapshot`."""
