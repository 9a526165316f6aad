"""The script of mutations fits the kernels as they are; running it takes minutes and stays a script."""

from mutations import MUTATIONS, PACKAGE


def test_every_mutation_changes_the_package():
    assert len(MUTATIONS) >= 10
    for name, mutation in MUTATIONS.items():
        assert mutation.old in (PACKAGE / mutation.file).read_text(), name
        assert mutation.new != mutation.old
