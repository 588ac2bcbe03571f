"""Turn a pretrained reasoning transformer into a fast hybrid.

Importing this package also makes transformers' Auto classes load hybrid checkpoints; it imports neither torch
nor transformers to do so (see `hybridize._register`).
"""

from hybridize import _register

__version__ = "0.1.0"

_register.install()
