"""Triton kernels of the `triton` backend, installed as fusedrnn.kernels.

    cells/        the pointwise functions of the cells and their derivatives, on tiles
    affine.py     the product of states with resident or streamed weights
    noise.py      per-unit parameters and multipliers of noise
    grid.py       the grid barrier of the programs that share a layer
    forward.py    one launch for a layer over all time steps, both directions
    backward.py   one launch for the gradients of the affine maps and the states
    device.py     known devices as data, for this planner and for that of the CUDA C++ kernels
    plan.py       the planner and its cost model; needs neither Triton nor a GPU
    launch.py     runs a launch: plan, buffers, kernel arguments
    compile.py    compiles ahead of time, for any architecture, on a machine without a GPU

Importing the package does not import Triton: the first launch does.
"""
