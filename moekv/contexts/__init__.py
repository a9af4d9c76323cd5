"""Documents that are compressed once, for any number of questions.

``context`` has the compressed document, ``documents`` reads files into text. The command line uses
both.

May import everything but ``moekv.integrations`` and ``moekv.cli``.
"""
