"""What a checkpoint is: names, slices, dtypes, shard headers."""
