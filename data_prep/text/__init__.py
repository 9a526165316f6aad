"""English text for small runs: WordNet glosses."""
