"""Other people's houses: what moekv does inside other packages, each in a room of its own.

May import everything below; nothing imports them but ``moekv`` itself, for what users call.
"""
