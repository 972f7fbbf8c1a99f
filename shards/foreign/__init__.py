"""WebDataset shards that somebody else wrote, indexed where they lie: what a member is, where its numbers stand.

Nothing is copied, extracted or unpickled. Each tar is read once, from its beginning to its end, with every size checked
before anything of that size is read; the table that results says at which byte of the tar each sample's numbers begin,
so that reading parses nothing.
"""
