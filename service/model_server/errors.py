"""What can go wrong with a model, for modules that must do without PyTorch."""


class ModelFailed(Exception):
    """The model's own code failed on a request that fits its specification."""
