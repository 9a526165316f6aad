"""`megafusion sweep`: many runs over one configuration, their evaluation, and one table of results."""
