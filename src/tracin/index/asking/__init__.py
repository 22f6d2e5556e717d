"""Asking an index: features of queries, a scan of the shards, and the distance from exact scores."""
