"""Triton kernels of the `triton` backend, installed as fusedrnn.kernels.

    cells/        the pointwise functions of the cells and their derivatives, on tiles: the piece that makes a cell
    affine.py     the product of states with weights that stay on the chip, or are streamed
    noise.py      parameters of units, and multipliers of noise
    grid.py       how the programs that share a layer meet
    forward.py    one launch for a layer over all time steps, both directions
    backward.py   one launch for its derivative with respect to the gates and the states
    device.py     the devices that are known, as data: for this planner and for that of the C++ kernels
    plan.py       the cost model that lays a problem out on a device; needs neither Triton nor a GPU
    launch.py     tensors in, tensors out: a plan, its buffers, its launch
    compile.py    compiles ahead of time, for any architecture, on a machine without a GPU

Importing the package imports nothing of it: Triton is loaded by the first launch.
"""
