"""What stayed of a prompt, to look at.

``recording`` is the record of a prefill, ``page`` writes the page that shows it, of ``pieces``.

May import nothing else of moekv.
"""
