"""What data is: records, readers of published formats, tar shards with an index, the epoch plan, batches."""
