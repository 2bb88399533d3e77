"""Tables whose rows stay on the disk: ids → places in shards → rows, and a cache of hot rows."""
