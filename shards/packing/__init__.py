"""How samples become shards: `job` says which samples go into which shard, `shard` makes one of them, and `here`,
`processes` or `on_ray` do so with all of them. `shards.write.pack` puts it together.

Which samples a shard holds is decided before the first is written, from the input, seed, dtype and shard size alone. So
each shard is a piece of work of its own: whoever does it, and when, it has the same bytes, and what is counted on the
way is merged in the shards' order.
"""
