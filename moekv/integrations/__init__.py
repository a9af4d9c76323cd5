"""moekv inside other packages, one subpackage for each.

``kvpress`` makes moekv's press one of kvpress's, and frees the memory of kvpress's presses;
``vllm`` is a plug-in of vLLM.

May import everything below; nothing imports them but ``moekv`` itself, for what users call.
"""
