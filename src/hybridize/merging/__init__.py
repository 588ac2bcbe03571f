"""Merging checkpoints tensor by tensor, streamed from shard to shard.

`merge` makes one checkpoint of several; `METHODS` is the one table of ways to do it.
"""

from hybridize.merging.merger import merge
from hybridize.merging.methods import METHODS, Method

__all__ = ["METHODS", "Method", "merge"]
