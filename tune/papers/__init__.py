"""The tables of the papers: what they print, the runs that stand behind a row of ours, and both beside each other."""
