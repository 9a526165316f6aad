"""A pipeline over HTTP, in OpenAI's shapes: limits, a queue that batches, answers."""
