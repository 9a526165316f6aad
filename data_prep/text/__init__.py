"""English text for small runs: WordNet glosses, and their builder."""
