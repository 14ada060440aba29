"""Token merging (arXiv 2303.17604): fewer tokens before an attention, all of them after it."""
