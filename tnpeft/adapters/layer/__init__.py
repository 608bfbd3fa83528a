"""One adapted weight: its forward, the path that a call takes, merging, and the bank of shared factors."""
