"""What a mixed sequence is: text tokens, image patches, the intervals that they see, and packing."""
