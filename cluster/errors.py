"""What can go wrong in a run, as types: a mistake in the settings, or a failure that stops training."""


class ConfigError(ValueError):
    """A user's mistake in the settings. One line per fault; each names the key, its value, and the remedy."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message names stage, epoch, step and cause.

    Survives pickling, since Ray carries it from a worker to the driver as its message alone.
    """
