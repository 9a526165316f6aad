"""The emoji pack: captioned images, the classifier of generated ones, and the quickstart's report."""
