"""Merging checkpoints tensor by tensor, streamed from shard to shard."""
