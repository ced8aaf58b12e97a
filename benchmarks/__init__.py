"""python -m fusedrnn bench: fusedrnn against nn.LSTM and its peers, checked first and then timed. docs/benchmarks.md"""
