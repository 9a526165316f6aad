"""MegaFusion: one transformer that writes text and draws images."""

__version__ = "0.2.0.dev0"


def __getattr__(name: str) -> object:
    """TransfusionPipeline, imported when it is asked for: the command's help needs no torch."""
    if name == "TransfusionPipeline":
        from megafusion.generate.pipeline import TransfusionPipeline

        return TransfusionPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
