"""lrpfx inside other libraries: each file is for one, and is imported by its own name.

An adapter translates arguments and results. It knows nothing of rules and graphs.
"""
