"""Turn a pretrained reasoning transformer into a fast hybrid."""

__version__ = "0.1.0"
