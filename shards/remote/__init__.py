"""Data sets that lie elsewhere: in a bucket or behind a web server.

`url` says which addresses are taken, `store` reads one object with patience (`google` those at gs://), `cache` keeps
objects on this machine under their content hash, `file` is what the rest of the package sees, and `ahead` fetches
before the need.
"""
