"""moekv inside vLLM: prompts are compressed, and their blocks freed.

``plugin``     the entry point that vLLM calls in each of its processes
``worker``     state that the layers of one engine share in a process
``options``    the options, and which blocks of a prompt are retained
``refusals``   configurations that are refused, before anything runs
``manager``    the scheduler's side: blocks are freed
``scheduler``  a scheduler whose steps end where prompts end
``requests``   prompt length and ratio of each request, in the workers
``metrics``    counters of what compression freed
``backend``    the worker's side: the classes that vLLM uses
``builder``    metadata of a step: which requests are scored, compressed, or read compressed
``attention``  one layer's attention in such a step
``rating``     scores of a prompt's pairs
``pages``      reads and writes pairs in vLLM's blocks
``compaction`` moves the retained pairs together
``heads``      attention where heads hold different numbers of blocks
``serve``      vLLM's own server with the plug-in on

May import everything but ``moekv.contexts`` and ``moekv.cli``. Nothing else may import vLLM, which
is optional. Only extension points of vLLM are used: nothing of it is patched. See docs/serving.md.
"""
