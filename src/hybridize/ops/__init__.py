"""The recurrences, below any module: pure functions on tensors, one folder per op.

Each op has the same faces and one truth: `reference.py`, a naive loop that reads like the paper's formula; a
fast form in plain torch; where it pays a GPU kernel; and one decode step. The folder's door checks the
arguments and picks the face by device. States are kept in fp32 (fp64 for fp64 inputs) whatever the inputs'
dtype. This room imports nothing else of ours.
"""
