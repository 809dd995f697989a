"""The modules: parameters, names of children, and which path each one takes."""
