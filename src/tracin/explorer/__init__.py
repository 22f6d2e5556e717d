"""A local web page that explains predictions and takes decisions on suspects: ``tracin serve``.

``live`` and ``kept`` read a study and a kept folder, ``pages`` makes of both what the page reads, ``app`` answers requests.
"""
