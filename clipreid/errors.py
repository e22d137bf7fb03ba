"""The one error type of the method: what a user can cause with weights, model names or sizes."""


class ModelError(ValueError):
    """One line that names the thing, its value, and the remedy."""
