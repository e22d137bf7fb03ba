"""The settings of a run: typed, read from YAML, with paths and the model's specification."""
