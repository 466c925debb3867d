"""Stage ``shard``: raw videos become clip shards."""
