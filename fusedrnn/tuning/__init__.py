"""Which backend is fastest on this machine: profiles of measured times, the choice by them, the command that measures.

`machine`, `profile` and `choice` lie below `fusedrnn.dispatch`, which asks them. The rest lies above the modules, which
it measures. See docs/tuning.md.
"""
