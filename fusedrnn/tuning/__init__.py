"""Autotuning: profiles of measured times, backend selection from them, and the command that measures.

`fusedrnn.dispatch` imports `machine`, `profile` and `choice`. The other modules import the layers, which they measure.
See docs/tuning.md.
"""
