"""A page that shows which pairs of a prompt were retained.

``recording`` is the record of a prefill, ``page`` writes the page that shows it, of ``pieces``.

May import ``moekv.files`` alone.
"""
