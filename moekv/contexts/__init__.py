"""A document that is compressed once, and asked often.

``context`` is what a user holds, ``documents`` reads files into text. The command line stands on
both.

May import everything but ``moekv.integrations`` and ``moekv.cli``.
"""
