"""The command line: ``main`` reads arguments, each command is a module.

May import everything; nothing imports it.
"""
