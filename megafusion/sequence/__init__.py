"""Mixed sequences: documents of text tokens and image patches, their masks as intervals, packing."""
