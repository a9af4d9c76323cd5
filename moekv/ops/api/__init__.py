"""The ops as they are called: one file per op, with its fake implementation and its gradient."""
