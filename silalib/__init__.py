"""Siamese Labels Auxiliary Learning (SiLa, arXiv 2103.00200): models, losses, trainer and the paper's exhibits."""

__version__ = "0.1.0"

_HOME = {
    "losses": ("METHODS", "SiameseLabelsLoss", "independent", "mutual_kl", "mutual_learning", "siamese_labels"),
    "models": ("MODELS",), "data": ("DATASETS",), "early_exit": ("EarlyExit",), "run": ("Run",),
    "records": ("load", "load_network"), "launch.ensure": ("ensure",), "comparison": ("compare",),
    "errors": ("UserError",),
}  # fmt: skip
__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name):
    """Import a public name when it is first used: `from silalib import siamese_labels` needs torch alone.

    Raises errors.MissingExtra, an ImportError, where a package is missing that an extra brings."""
    from importlib import import_module

    for module, names in _HOME.items():
        if name in names:
            try:
                return getattr(import_module(f"silalib.{module}"), name)
            except ModuleNotFoundError as error:
                raise import_module("silalib.errors").missing_extra(error) from None
    raise AttributeError(f"module 'silalib' has no attribute {name!r}")
