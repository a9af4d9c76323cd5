"""Other people's houses: what moekv does inside other packages, each in a room of its own.

``kvpress`` serves the presses of kvpress, and is served by them; ``vllm`` is a plug-in of vLLM.

May import everything below; nothing imports them but ``moekv`` itself, for what users call.
"""
