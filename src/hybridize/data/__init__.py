"""Reasoning traces: make them, read them, render them in a chat format, pack them."""
