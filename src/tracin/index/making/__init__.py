"""Making the shards of an index: by one process, several, or a cluster."""
