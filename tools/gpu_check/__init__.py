"""What a few minutes on a GPU are spent on, in the order of what they are worth.

``make gpu-check`` runs it. ``machine`` looks what is there, ``driver`` runs the steps, each in
processes of its own with limits in time, ``report`` keeps what they have told so far in one JSON
and one Markdown file, ``worker`` is such a process, and ``gpu`` is the device as the steps see it.
The steps:

==  ==============  ================================================================
--  ``build``       the libraries, for the GPU that is there
a   ``smoke``       each op once on odd sizes, against the reference
b   ``timing``      each op beside a copy and a matrix product, and its peers
c   ``end_to_end``  a model of Llama-3.1-8B's shape: prefill, decoding, graphs, streams
d   ``suite``       the tests of the ops and the press on the GPU
e   ``sanitizer``   compute-sanitizer's four tools over the smoke test
f   ``profile``     ncu on what is furthest from the roofline
==  ==============  ================================================================

Needed: torch 2.10 or later with CUDA, nvcc, a C++ compiler, cmake and ninja; for steps c and d
transformers, for d pytest and hypothesis. No network, no kvpress, and moekv need not be installed.
"""
