"""The networks: image encoders, prompts with the text tower, necks and classifiers."""
