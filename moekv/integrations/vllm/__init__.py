"""moekv inside vLLM: prompts are compressed, and their blocks freed.

``plugin``     what vLLM calls in each of its processes
``worker``     what the layers of one engine share in a process
``options``    what is asked for, and which blocks of a prompt stay
``refusals``   what cannot be served, said before anything runs
``manager``    the scheduler's side: blocks are given back
``scheduler``  its steps end where prompts end
``requests``   what a worker knows of each request
``metrics``    what compression did, for people to see
``backend``    the worker's side: which classes vLLM takes
``builder``    what a step means for each request: rated, compressed, or read where it is compressed
``attention``  a layer's part in that
``rating``     what the pairs of a prompt are worth
``pages``      reads and writes pairs in vLLM's blocks
``compaction`` moves the pairs that stay together
``heads``      attention where heads hold different numbers of blocks
``serve``      vLLM's own server with the plug-in on

May import everything but ``moekv.contexts`` and ``moekv.cli``. The only room that may import vLLM,
which need not be installed for anything else. All that vLLM offers is used as it offers it: nothing
of it is patched. See docs/serving.md.
"""
