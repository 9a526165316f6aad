"""A package, so that no other `tests` that a dependency installs is found in its place."""
