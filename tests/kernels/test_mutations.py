"""mutations.py matches the current kernels. It takes minutes to run, so it is a script and not a test."""

from mutations import MUTATIONS, PACKAGE


def test_every_mutation_changes_the_package():
    assert len(MUTATIONS) >= 10
    for name, mutation in MUTATIONS.items():
        assert mutation.old in (PACKAGE / mutation.file).read_text(), name
        assert mutation.new != mutation.old
