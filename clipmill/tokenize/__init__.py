"""Stage ``tokenize``: clip shards become token shards."""
