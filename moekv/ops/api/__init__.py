"""The public functions: one file per op, with its fake implementation and its gradient."""
