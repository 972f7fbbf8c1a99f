"""`mmsa-dist doctor`: whether a machine, or every node of a cluster, can do what training asks of it.

What looks at a node (`look`, and what it calls) is sent there as an archive and runs in a process of its own for each
check: a node needs Python and Ray, not this package, and a check that hangs is ended. The standard library is all that
those files import at their head. What asks the nodes and shows their answers is `command`, `nodes`, `across`, `table`.
"""
